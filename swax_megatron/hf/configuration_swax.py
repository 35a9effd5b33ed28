"""Configuration of a SWAX model: mLSTM layers and sliding-window attention layers in any order.

Shipped inside every export, so it imports transformers alone.
"""

from transformers import PreTrainedConfig

LAYER_TYPES = ("linear_attention", "sliding_attention", "full_attention")


class SwaxConfig(PreTrainedConfig):
    """What a SWAX model is.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward network.
        num_hidden_layers: layers; must equal ``len(layer_types)``.
        layer_types: one a layer: ``linear_attention`` (mLSTM), ``sliding_attention``, ``full_attention``.
            None: mLSTM and sliding-window attention in turn.
        num_attention_heads, num_key_value_heads, head_dim: the attention layers (grouped-query attention).
        sliding_window: keys a query of a sliding layer sees, itself included. Free to change after training.
        rope_theta: base of the rotary angles (rotate-half form).
        rope_layer_types: the kinds of attention layers that use rotary positions; the others have none.
        num_mlstm_heads, mlstm_qk_head_dim, mlstm_v_head_dim: the mLSTM layers.
        mlstm_chunk_size: tokens processed at once by the chunkwise form; changes speed and memory, not the result.
        gate_cap: soft cap c*tanh(x/c) of the mLSTM gate pre-activations.
        logit_cap: soft cap of the output logits; None: no cap.
        norm_eps: epsilon of every norm. mlstm_eps: epsilon of the mLSTM normaliser.
        initializer_range: standard deviation of fresh weights.
        kernels: ``auto`` uses the project's Triton kernels where it is installed and the model is on a GPU; ``off`` never does.
        max_position_embeddings: sequence length of the training; no table depends on it.
    """

    model_type = "swax"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        layer_types=None,
        num_attention_heads=16,
        num_key_value_heads=None,
        head_dim=None,
        sliding_window=2048,
        rope_theta=10000.0,
        rope_layer_types=("sliding_attention", "full_attention"),
        num_mlstm_heads=4,
        mlstm_qk_head_dim=None,
        mlstm_v_head_dim=None,
        mlstm_chunk_size=256,
        gate_cap=15.0,
        logit_cap=30.0,
        norm_eps=1e-6,
        mlstm_eps=1e-6,
        initializer_range=0.02,
        max_position_embeddings=16384,
        kernels="auto",
        use_cache=True,
        tie_word_embeddings=False,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    ):
        if layer_types is None:
            layer_types = [LAYER_TYPES[i % 2] for i in range(num_hidden_layers)]
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.layer_types = list(layer_types)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.sliding_window = sliding_window
        self.rope_theta = rope_theta
        self.rope_layer_types = list(rope_layer_types)
        self.num_mlstm_heads = num_mlstm_heads
        self.mlstm_qk_head_dim = hidden_size // num_mlstm_heads // 2 if mlstm_qk_head_dim is None else mlstm_qk_head_dim
        self.mlstm_v_head_dim = hidden_size // num_mlstm_heads if mlstm_v_head_dim is None else mlstm_v_head_dim
        self.mlstm_chunk_size = mlstm_chunk_size
        self.gate_cap = gate_cap
        self.logit_cap = logit_cap
        self.norm_eps = norm_eps
        self.mlstm_eps = mlstm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.kernels = kernels
        self.use_cache = use_cache
        self.number_of_conv_states = 3  # states an mLSTM layer keeps in transformers' cache: C, n, m
        self._check()
        kwargs.pop("number_of_conv_states", None)
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self):
        unknown = sorted(set(self.layer_types + self.rope_layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types and rope_layer_types know {', '.join(LAYER_TYPES)}; got {', '.join(unknown)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        if "sliding_attention" in self.layer_types and not (isinstance(self.sliding_window, int) and self.sliding_window >= 1):
            raise ValueError(f"sliding_window={self.sliding_window!r} must be an integer of at least 1 (a query sees itself)")
        if self.rope_layer_types and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        if self.mlstm_chunk_size < 1:
            raise ValueError(f"mlstm_chunk_size={self.mlstm_chunk_size} must be at least 1")
        if self.kernels not in ("auto", "off"):
            raise ValueError(f"kernels={self.kernels!r} must be 'auto' or 'off'")
