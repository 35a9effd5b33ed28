"""Rotary positions (RoPE, Su et al. 2021), rotate-half form."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_bthd: Tensor, cos_bt1d: Tensor, sin_bt1d: Tensor) -> Tensor:
    """Turn channel i of the first half against channel i of the second; fp32 products, result in the input's type.

    x_bthd: (B, T, H, D); cos and sin: (B, T, 1, D / 2)
    """
    first, second = x_bthd.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_bt1d - second * sin_bt1d, second * cos_bt1d + first * sin_bt1d], dim=-1)
    return turned.to(x_bthd.dtype)
