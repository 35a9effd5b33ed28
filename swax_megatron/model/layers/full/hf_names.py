"""Parameters of a full-attention layer's mixer: training name -> name in the Hugging Face export, both relative to the layer."""

HF_NAMES = {
    f"self_attention.{name}": f"mixer.{name}" for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")
}
