"""Parameters and floating-point operations of one attention mixer (S and F)."""

from __future__ import annotations

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
