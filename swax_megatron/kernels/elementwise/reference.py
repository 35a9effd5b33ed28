"""SwiGLU's activation, rotary positions and the mLSTM's scalar gates in plain torch. Legend as in `__init__.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def frequencies(d: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i / d) for every pair of channels, (d / 2,) float32."""
    return base ** -(torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)


def rotary_reference(q_bthd: Tensor, k_btgd: Tensor, positions_bt: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Angles in float32; cosines and products in float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(q_bthd.dtype, torch.float32)
    angle_bt1d = (positions_bt[:, :, None, None].float() * frequencies(q_bthd.shape[-1], base, q_bthd.device)).to(dtype)
    cos, sin = angle_bt1d.cos(), angle_bt1d.sin()

    def turned(x: Tensor) -> Tensor:
        first, second = x.to(dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return turned(q_bthd), turned(k_btgd)


def gate_projections_reference(
    x: Tensor, igate_weight: Tensor, igate_bias: Tensor, fgate_weight: Tensor, fgate_bias: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    return F.linear(x, igate_weight.to(dtype), igate_bias.to(dtype)), F.linear(x, fgate_weight.to(dtype), fgate_bias.to(dtype))
