"""Launches of the kernels in `triton_kernels.py`: layouts, grids, tile sizes. No autograd here (see `triton_op.py`)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..documents import capturing
from ..launching import launch
from . import triton_kernels as kernels
from .reference import frequencies

SWIGLU_BLOCK = 4096  # elements a program
ROTARY_TOKENS, ROTARY_HEADS = 8, 8  # a program; sine and cosine are computed once for these heads
GATE_ROWS, GATE_COLUMNS = 32, 128
GATE_SPLITS = 16  # parts of the rows whose weight gradients are summed afterwards


def rows(x: Tensor) -> Tensor:
    """x itself when its last dimension is dense (the kernels take any other stride), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y, contiguous, in the shape of gate and up."""
    gate, up = gate.contiguous(), up.contiguous()
    y, width = torch.empty_like(gate), gate.shape[-1]
    grid = -(-gate.numel() // SWIGLU_BLOCK), 1, 1
    constants = {"WIDTH": width, "BLOCK": SWIGLU_BLOCK, "num_warps": 8}
    launch(kernels.swiglu, grid, (gate, up, y), (gate.numel() // width,), constants)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate, dup, contiguous."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
    grid = -(-gate.numel() // SWIGLU_BLOCK), 1, 1
    constants = {"WIDTH": width, "BLOCK": SWIGLU_BLOCK, "num_warps": 8}
    launch(kernels.swiglu_gradients, grid, (dy, gate, up, dgate, dup), (gate.numel() // width,), constants)
    return dgate, dup


@functools.cache
def _kept_frequencies(d: int, base: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return frequencies(d, base, device)


def rotary(q: Tensor, k: Tensor, positions: Tensor, base: float, back: bool) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, G, D) turned, each laid out in memory as it came."""
    batch, length, heads, d = q.shape
    q, k, positions = rows(q), rows(k), positions.contiguous()
    yq, yk = torch.empty_like(q), torch.empty_like(k)
    groups, half = k.shape[2], d // 2
    grid = -(-length // ROTARY_TOKENS), -(-heads // ROTARY_HEADS) + -(-groups // ROTARY_HEADS), batch
    strides = [s for x in (q, k, yq, yk) for s in x.stride()[:3]]
    sizes = {"HALF": half, "PADDED": triton.next_power_of_2(half), "BT": ROTARY_TOKENS, "BH": ROTARY_HEADS, "BACK": back, "num_warps": 4}
    tensors = q, k, positions, (frequencies if capturing() else _kept_frequencies)(d, base, q.device), yq, yk
    launch(kernels.rotary, grid, tensors, (length, heads, groups, *strides), sizes)
    return yq, yk


def _gate_sizes(width: int, heads: int) -> dict[str, int]:
    columns = max(16, min(GATE_COLUMNS, triton.next_power_of_2(width)))
    return {"WIDTH": width, "N": heads, "GATES": max(16, triton.next_power_of_2(2 * heads)), "BM": GATE_ROWS, "BD": columns}


def gates_forward(x: Tensor, wi: Tensor, bi: Tensor, wf: Tensor, bf: Tensor) -> tuple[Tensor, Tensor]:
    """i~ and f~ (..., N) float32 of x (..., X). Products of bfloat16 numbers are exact in float32: such inputs go in as they are."""
    heads, width = wi.shape
    flat = rows(x.reshape(-1, width))
    i, f = (torch.empty(*x.shape[:-1], heads, device=x.device, dtype=torch.float32) for _ in range(2))
    narrow = x.dtype == wi.dtype == wf.dtype == torch.bfloat16
    tensors = flat, wi.contiguous(), bi.contiguous(), wf.contiguous(), bf.contiguous(), i, f
    constants = {**_gate_sizes(width, heads), "DT": tl.bfloat16 if narrow else tl.float32, "num_warps": 4, "num_stages": 3}
    launch(kernels.gate_values, (-(-flat.shape[0] // GATE_ROWS), 1, 1), tensors, (flat.shape[0], flat.stride(0)), constants)
    return i, f


def gates_backward(di: Tensor, df: Tensor, x: Tensor, wi: Tensor, wf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx in x's dtype (contiguous), and the weights' gradients (N, X) in float32."""
    heads, width = wi.shape
    flat, sizes = rows(x.reshape(-1, width)), _gate_sizes(width, heads)
    count = flat.shape[0]
    splits = min(GATE_SPLITS, -(-count // GATE_ROWS))
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    parts = torch.empty(splits, sizes["GATES"], width, device=x.device, dtype=torch.float32)
    tensors = di.contiguous(), df.contiguous(), flat, wi.contiguous(), wf.contiguous(), dx, parts
    grid, constants = (-(-width // sizes["BD"]), splits, 1), {**sizes, "num_warps": 8, "num_stages": 3}
    launch(kernels.gate_gradients, grid, tensors, (count, flat.stride(0)), constants)
    dw = parts.sum(0)
    return dx, dw[:heads].clone(), dw[heads : 2 * heads].clone()
