"""Parameters and floating-point operations of a full-attention mixer: those of attention whose window is the row."""

from __future__ import annotations

from swax_megatron.model.layers.footprint import Footprint
from swax_megatron.model.layers.swa import cost as swa
from swax_megatron.model.layers.swa.cost import param_count, projection_flops
from swax_megatron.schema import ModelConfig

__all__ = ["context_bytes", "core_flops", "footprint", "param_count", "projection_flops"]


def core_flops(model: ModelConfig, sequence_length: int, window: int) -> float:
    """Forward operations of scores and weighted values a token over the whole row."""
    return swa.core_flops(model, sequence_length, sequence_length)


def footprint(model: ModelConfig, length: int, window: int, width: int, kernels: str, chunk: int) -> Footprint:
    """Bytes a token that backward needs: those of a window as long as the row."""
    return swa.footprint(model, length, length, width, kernels, chunk)


def context_bytes(model: ModelConfig, length: int, window: int, width: int, ranks: int, rank: int = 0) -> float:
    """Bytes that a rank (the first: the most) sends for one row's forward pass: its keys and values to all behind it."""
    return swa.context_bytes(model, length, length, width, ranks, rank)
