"""Matrix products in 8 bits (Micikevicius et al. 2022): one scale a tensor from its largest magnitude, forward e4m3, gradients e5m2.

The products are torch's own (cuBLAS), with float32 sums. They want both factors with the summed dimension last, so that every
matrix is written twice, as it is and turned; its bf16 form is not kept for the backward pass.
Legend: i inputs, o outputs of all the projections of one input together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..documents import triton_missing
from .shrink import BACKWARD, FORWARD, Weights, shrink

__all__ = ["BACKWARD", "FORWARD", "Products", "Weights", "missing", "product", "shrink"]


def missing(device: torch.device) -> str | None:
    """Why products in 8 bits cannot run on ``device``; None if they can."""
    return triton_missing(device) if device.type == "cuda" else f"there are none on {device.type}"


def product(a_rk: Tensor, b_ck: Tensor, scale_a: Tensor, scale_b: Tensor, *, fast: bool) -> Tensor:
    """a bᵀ in bf16. fast: partial sums stay in the tensor cores' own precision throughout, else they go to float32 every few terms."""
    return torch._scaled_mm(a_rk, b_ck.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


class Products(torch.autograd.Function):
    """x (..., i), the weights' holder, weights (o_1, i), (o_2, i) ... -> (..., o_1), (..., o_2) ..."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, holder: Weights, *weights: Tensor) -> tuple[Tensor, ...]:
        plain, turned, scale_x = shrink([x.reshape(-1, x.shape[-1])], FORWARD)
        plain_w, turned_w, scale_w = holder.small(weights)
        ctx.save_for_backward(turned, scale_x, turned_w, scale_w)
        ctx.sizes, ctx.shape = [weight.shape[0] for weight in weights], x.shape
        parts = plain_w.split(ctx.sizes)
        return tuple(product(plain, part, scale_x, scale_w, fast=True).view(*x.shape[:-1], -1) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        turned_x, scale_x, turned_w, scale_w = ctx.saved_tensors
        plain, turned, scale = shrink([dy.reshape(-1, dy.shape[-1]) for dy in gradients], BACKWARD)
        dx = product(plain, turned_w, scale, scale_w, fast=False)
        d_weights = product(turned, turned_x, scale, scale_x, fast=False)
        return dx.view(ctx.shape), None, *d_weights.split(ctx.sizes)
