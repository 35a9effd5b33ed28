"""Parameters and floating-point operations of a full-attention mixer: those of attention whose window is the row."""

from __future__ import annotations

from swax_megatron.model.layers.swa import cost as swa
from swax_megatron.model.layers.swa.cost import param_count, projection_flops
from swax_megatron.schema import ModelConfig

__all__ = ["core_flops", "param_count", "projection_flops"]


def core_flops(model: ModelConfig, sequence_length: int, window: int) -> float:
    """Forward operations of scores and weighted values a token over the whole row."""
    return swa.core_flops(model, sequence_length, sequence_length)
