"""Parameters and floating-point operations of one attention mixer (S and F)."""

from __future__ import annotations

from swax_megatron.model.layers.footprint import Footprint
from swax_megatron.schema import ModelConfig


def param_count(model: ModelConfig) -> int:
    """Projections q, k, v and out."""
    return 2 * model.hidden_size * model.attention_head_dim * (model.attention_heads + model.attention_kv_heads)


def projection_flops(model: ModelConfig) -> float:
    """Forward matrix products a token, 2 operations a multiply-add."""
    return 2.0 * param_count(model)


def visible_keys(sequence_length: int, window: int) -> float:
    """Mean number of keys that a query of a row sees: min(t + 1, w) averaged over t < T. The causal half counts once.

    Documents are not looked at: where many short ones share a row, fewer keys are visible than this says.
    """
    window = min(window, sequence_length)
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


def core_flops(model: ModelConfig, sequence_length: int, window: int) -> float:
    """Forward operations of scores and weighted values a token, for the keys inside the window only."""
    return 4.0 * model.attention_heads * model.attention_head_dim * visible_keys(sequence_length, window)


def footprint(model: ModelConfig, length: int, window: int, width: int, kernels: str, chunk: int) -> Footprint:
    """Bytes a token that backward needs. length: tokens of a row on this rank; width: bytes of an activation; chunk: not used."""
    size, heads = model.attention_head_dim, model.attention_heads
    queries, keys = heads * size, model.attention_kv_heads * size
    inputs = float(width * (queries + 2 * keys))
    if kernels == "triton":  # the output, which the kernel keeps, is the output projection's input
        return Footprint(inputs, width * (queries + 2 * keys) + 4.0 * heads, float(width * queries))
    rotary = 4.0 * size if "S" in model.rope_kinds else 0.0  # sine and cosine
    window = min(window, length)
    block = length if window == length else min(length, max(16, -(-window // 2)))
    seen = block if window == length else block + window - 1
    padding = -(-length // block) * block / length
    slices = seen / block  # a key stands in the slices of several blocks
    core = padding * (4.0 * (queries + 2 * keys * slices) + 4.0 * heads * seen + seen) + rotary
    return Footprint(inputs, core, float(width * queries))


def context_bytes(model: ModelConfig, length: int, window: int, width: int, ranks: int, rank: int = 0) -> float:
    """Bytes that a rank (the first: the most) sends for one row's forward pass: keys and values of its last window - 1 positions.

    length: tokens of the whole row. A window larger than a piece reaches over several neighbours, as far as there are
    any to the right. In backward the rank at the mirrored place sends as much to the left.
    """
    if ranks == 1:
        return 0.0
    reach = min(window - 1, (ranks - 1 - rank) * (length // ranks))
    return float(reach * 2 * model.attention_kv_heads * model.attention_head_dim * width)
