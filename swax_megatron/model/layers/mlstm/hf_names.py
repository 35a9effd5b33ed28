"""Parameters of an mLSTM layer's mixer: training name -> name in the Hugging Face export.

Both are relative to the layer; the layer's norms and its feed-forward network are in ``hf/names.py``.
"""

HF_NAMES = {
    f"self_attention.{name}": f"mixer.{name}"
    for name in (
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "ogate_proj.weight",
        "igate_proj.weight",
        "igate_proj.bias",
        "fgate_proj.weight",
        "fgate_proj.bias",
        "head_norm.weight",
        "out_proj.weight",
    )
}
