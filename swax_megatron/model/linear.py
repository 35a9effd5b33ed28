"""Tensor-parallel linear maps: enter the parallel region once, project with local shards, leave it once.

Megatron's ColumnParallelLinear gathers its input for itself; a mixer has five to six projections of the same input,
so the gather (or, without sequence parallelism, the backward all-reduce) stands here once for all of them (`projections.py`).

Shapes: s sequence (the local piece outside the region under sequence parallelism), b batch, h hidden, n local outputs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from swax_megatron.kernels import fp8
from swax_megatron.model.initial import Initial, matrix, residual_matrix
from swax_megatron.model.parameters import declare
from swax_megatron.model.transformer_config import SwaxTransformerConfig


def new_parameter(config: SwaxTransformerConfig, *shape: int) -> nn.Parameter:
    """An unfilled parameter of the model's type on this process's device."""
    return nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=torch.cuda.current_device()))


def enter_tensor_parallel(x_sbh: Tensor, config: SwaxTransformerConfig) -> Tensor:
    """The whole sequence on every tensor-parallel rank; backward adds the ranks' gradients up."""
    if config.tensor_model_parallel_size == 1:
        return x_sbh
    group: dist.ProcessGroup = config.groups.tp
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(x_sbh, group=group)
    return copy_to_tensor_model_parallel_region(x_sbh, group=group)


def leave_tensor_parallel(x_sbh: Tensor, config: SwaxTransformerConfig) -> Tensor:
    """Add the ranks' partial results; under sequence parallelism keep the local piece of the sequence."""
    if config.tensor_model_parallel_size == 1:
        return x_sbh
    group: dist.ProcessGroup = config.groups.tp
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(x_sbh, group=group)
    return reduce_from_tensor_model_parallel_region(x_sbh, group=group)


class ColumnLinear(nn.Module):
    """y = x Wᵀ with the outputs split over the tensor-parallel ranks; x is whole (see enter_tensor_parallel)."""

    def __init__(self, config: SwaxTransformerConfig, inputs: int, outputs: int, initial: Initial | None = None) -> None:
        super().__init__()
        self.weight = new_parameter(config, outputs // config.tensor_model_parallel_size, inputs)
        declare(self.weight, initial or matrix(config.model), shard_dim=0, decay=True)
        self.small = fp8.Weights() if config.small_products else None  # of all the projections of one input, at the first of them

    def forward(self, x_sbh: Tensor) -> Tensor:
        return F.linear(x_sbh, self.weight)


class RowLinear(nn.Module):
    """y = x Wᵀ with the inputs split over the tensor-parallel ranks; the result is a partial sum (see leave_tensor_parallel)."""

    def __init__(self, config: SwaxTransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = new_parameter(config, outputs, inputs // config.tensor_model_parallel_size)
        declare(self.weight, residual_matrix(config.model), shard_dim=1, decay=True)
        self.small = fp8.Weights() if config.small_products else None

    def forward(self, x_sbn: Tensor) -> Tensor:
        if self.small is not None:
            return fp8.Products.apply(x_sbn, self.small, self.weight)[0]
        return F.linear(x_sbn, self.weight)
