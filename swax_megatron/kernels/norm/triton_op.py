"""The RMSNorm kernels under autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launching import launch
from . import triton_kernels as kernels

PROGRAMS_A_CORE = 4  # backward: programs a multiprocessor, each with a share of the weight's gradient


def _sizes(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"WIDTH": width, "PADDED": padded, "num_warps": min(16, max(1, padded // 512))}


@functools.cache
def _programs(device: torch.device) -> int:
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return PROGRAMS_A_CORE * cores


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, contiguous in x's shape, and the scale of every row, float32."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    scale = torch.empty(rows, device=x.device, dtype=torch.float32)
    launch(kernels.rms_norm, (rows,), (x.contiguous(), weight, y, scale), (rows, float(eps)), _sizes(width))
    return y, scale


def backward(dy: Tensor, beside: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, contiguous, and the weight's gradient."""
    width, rows = x.shape[-1], scale.numel()
    programs = min(rows, _programs(x.device))
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    parts = torch.empty(programs, width, device=x.device, dtype=torch.float32)
    dy = dy.contiguous()
    tensors = dy, dy if beside is None else beside.contiguous(), x.contiguous(), weight, scale, dx, parts
    launch(kernels.rms_norm_gradients, (programs,), tensors, (rows,), {"BESIDE": beside is not None, **_sizes(width)})
    return dx, parts.sum(0).to(weight.dtype)


class RmsNorm(torch.autograd.Function):
    """x, weight, eps -> the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *backward(dy, None, *ctx.saved_tensors), None


class RmsNormBeside(torch.autograd.Function):
    """x, weight, eps -> x and the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, scale = forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, beside: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if dy is None:
            return beside, None, None
        return *backward(dy, beside, *ctx.saved_tensors), None
