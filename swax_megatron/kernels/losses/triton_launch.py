"""Launches of the kernels in `triton_kernels.py`. Legend as in `__init__.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..launching import launch
from . import triton_kernels as kernels

BLOCK = 2048  # columns a program takes at a time
WARPS = 8


def _sizes(raw_nv: Tensor, cap: float | None) -> dict:
    columns = raw_nv.shape[1]
    block = min(BLOCK, triton.next_power_of_2(columns))
    return {"COLUMNS": columns, "CAP": float(cap or 0.0), "BLOCK": block, "num_warps": WARPS if block == BLOCK else 4}


def statistics(raw_nv: Tensor, targets_n: Tensor, real: int, cap: float | None) -> tuple[Tensor, Tensor]:
    """Log-partition and chosen logit, (n,) float32 each."""
    raw_nv, rows = _dense(raw_nv), len(raw_nv)
    log_partition_n, chosen_n = (torch.empty(rows, device=raw_nv.device, dtype=torch.float32) for _ in range(2))
    real = max(0, min(real, raw_nv.shape[1]))
    tensors = raw_nv, targets_n.contiguous(), log_partition_n, chosen_n
    launch(kernels.logit_statistics, (rows,), tensors, (raw_nv.stride(0), real), _sizes(raw_nv, cap))
    return log_partition_n, chosen_n


def gradients(
    raw_nv: Tensor, targets_n: Tensor, log_partition_n: Tensor, d_log_partition_n: Tensor, d_chosen_n: Tensor, real: int, cap: float | None
) -> Tensor:
    """The gradient of raw, in its place."""
    raw_nv = _dense(raw_nv)
    real = max(0, min(real, raw_nv.shape[1]))
    tensors = raw_nv, *(each.contiguous() for each in (targets_n, log_partition_n, d_log_partition_n, d_chosen_n))
    launch(kernels.logit_gradients, (len(raw_nv),), tensors, (raw_nv.stride(0), real), _sizes(raw_nv, cap))
    return raw_nv


def _dense(raw_nv: Tensor) -> Tensor:
    return raw_nv if raw_nv.stride(-1) == 1 else raw_nv.contiguous()
