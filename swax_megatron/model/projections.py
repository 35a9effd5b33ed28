"""From the residual stream into several projections of it, and back out of the tensor-parallel region.

Gradients of one input of several projections are added up inside the matrix products: autograd alone would write one gradient a
projection and add them up in passes over memory of their own. Where parallel.overlap allows, transfers run beside the products
(`overlap.py`).

Shapes: s sequence (the local piece outside the region under sequence parallelism), b batch, h hidden, n local outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swax_megatron.kernels import fp8
from swax_megatron.kernels.elementwise import swiglu, uses_triton
from swax_megatron.kernels.feedforward import GatedDown
from swax_megatron.model.linear import ColumnLinear, RowLinear, enter_tensor_parallel, leave_tensor_parallel
from swax_megatron.model.overlap import EnterAndProject, ProjectAndLeave
from swax_megatron.model.transformer_config import SwaxTransformerConfig


def enter_and_project(x_sbh: Tensor, config: SwaxTransformerConfig, linears: Sequence[ColumnLinear]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Enter the tensor-parallel region: the whole sequence, and its projections."""
    if not _overlaps(config, *linears):
        whole_sbh = enter_tensor_parallel(x_sbh, config)
        return whole_sbh, _project(whole_sbh, *linears)
    whole_sbh, *projected = EnterAndProject.apply(x_sbh, config.groups.tp, config.sequence_parallel, *(each.weight for each in linears))
    return whole_sbh, tuple(projected)


def project_and_leave(x_sbn: Tensor, config: SwaxTransformerConfig, linear: RowLinear) -> Tensor:
    """Project and leave the tensor-parallel region."""
    if config.sequence_parallel and _overlaps(config, linear):
        return ProjectAndLeave.apply(x_sbn, linear.weight, config.groups.tp)
    return leave_tensor_parallel(linear(x_sbn), config)


def swiglu_and_leave(gate_sbf: Tensor, up_sbf: Tensor, config: SwaxTransformerConfig, linear: RowLinear) -> Tensor:
    """SwiGLU's product, projected, out of the tensor-parallel region.

    Backward makes the product again, unless it is kept in 8 bits, sent in pieces, its weight gathered by DeepSpeed, or without kernels.
    """
    plain = linear.small is None and not hasattr(linear.weight, "ds_id") and not (config.sequence_parallel and _overlaps(config, linear))
    if plain and torch.is_grad_enabled() and uses_triton(gate_sbf, config.kernels.backend):
        return leave_tensor_parallel(GatedDown.apply(gate_sbf, up_sbf, linear.weight), config)
    return project_and_leave(swiglu(gate_sbf, up_sbf, backend=config.kernels.backend), config, linear)


def _overlaps(config: SwaxTransformerConfig, *linears: ColumnLinear | RowLinear) -> bool:
    """Not in 8 bits; ZeRO's stage 3 gathers a weight when its own module is called; gloo cannot send a CUDA tensor to one peer."""
    if config.tensor_model_parallel_size == 1 or not config.overlap or config.small_products:
        return False
    if any(hasattr(linear.weight, "ds_id") for linear in linears):
        return False
    return not linears[0].weight.is_cuda or dist.get_backend(config.groups.tp) == "nccl"


def _project(x_sbh: Tensor, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Every layer of x. Who calls this for its layers lends their weights from ``borrowed`` (ZeRO's stage 3)."""
    weights = [layer.weight for layer in layers]
    if layers[0].small is not None:
        return fp8.Products.apply(x_sbh, layers[0].small, *weights)
    if not torch.is_grad_enabled():  # nothing is to be added up
        return tuple(layer(x_sbh) for layer in layers)
    return _Projections.apply(x_sbh, *weights)


class _Projections(torch.autograd.Function):
    """x (..., h), weights (n_i, h) -> (..., n_i)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat_x = x.reshape(-1, x.shape[-1])
        flat_dx = torch.empty_like(flat_x)
        d_weights = []
        for index, (dy, weight) in enumerate(zip(gradients, weights, strict=True)):
            dy = dy.reshape(-1, dy.shape[-1])
            torch.mm(dy, weight, out=flat_dx) if index == 0 else torch.addmm(flat_dx, dy, weight, out=flat_dx)
            d_weights.append(dy.t() @ flat_x if ctx.needs_input_grad[1 + index] else None)
        return flat_dx.view(x.shape), *d_weights
