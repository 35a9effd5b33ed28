"""down(silu(gate) * up) without the product being kept: backward makes it again where it reads gate and up anyway.

One more tensor written in backward, one less kept from forward: the largest that a layer keeps but for gate and up themselves.
Needs Triton; see `kernels/elementwise` for SwiGLU by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..elementwise import swiglu


class GatedDown(torch.autograd.Function):
    """gate, up (..., f), weight (o, f) -> (..., o)"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(swiglu(gate, up, backend="triton"), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from .triton_kernels import gradients_and_product

        gate, up, weight = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dgate, dup, product = gradients_and_product(dy @ weight, gate, up)
        return dgate, dup, dy.t() @ product.view(-1, product.shape[-1])
