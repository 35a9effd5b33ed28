"""Several projections of one input: their gradients of that input are added up inside the matrix products.

Autograd alone would write one gradient a projection and add them up in passes over memory of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swax_megatron.kernels import fp8
from swax_megatron.model.linear import ColumnLinear


def project(x_sbh: Tensor, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Every layer of x. Without gradients, where nothing is to be added up, each is called by itself.

    Whoever calls this reads weights of other modules, and must name them to ZeRO's stage 3 (``borrowed``).
    """
    weights = [layer.weight for layer in layers]
    if layers[0].small is not None:
        return fp8.Products.apply(x_sbh, layers[0].small, *weights)
    if not torch.is_grad_enabled():
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
