"""Launches of the sliding-window attention kernels and the table of tile sizes. No autograd here (see `triton_op.py`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_kernels as kernels
from . import triton_onepass as onepass


class Tile(NamedTuple):
    """Rows of queries and keys per block, most heads packed into the rows, a loop of its own for unmasked blocks, warps, stages."""

    queries: int
    keys: int
    pack: int
    split: bool
    warps: int
    stages: int

    def options(self) -> dict[str, int | bool]:
        return {"BM": self.queries, "BN": self.keys, "SPLIT": self.split, "num_warps": self.warps, "num_stages": self.stages}

    def packed(self, share: int) -> int:
        """Heads to pack when `share` query heads share a key/value head."""
        return math.gcd(self.pack, share)


class Config(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile
    onepass: tuple[Tile, int] | None = None  # dq, dk and dv together, and how dq is added (`triton_onepass.py`); not deterministic


NARROW = 512  # windows up to this use the first table: few key blocks a query, no loop for the unmasked ones
_NARROW = Config(Tile(64, 32, 4, False, 4, 3), Tile(64, 32, 4, False, 4, 3), Tile(32, 64, 1, False, 4, 3))
_WIDE = Config(Tile(128, 64, 4, True, 8, 3), Tile(64, 64, 2, True, 4, 2), Tile(32, 64, 1, True, 4, 3))
CONFIGS: dict[tuple[int, bool], Config] = {  # (head size, window <= NARROW)
    (64, True): _NARROW,
    (64, False): _WIDE,
    (128, True): _NARROW,
    (128, False): _WIDE,
}

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _rows(x: Tensor) -> Tensor:
    """x itself when its last dimension is dense (the kernels take any other stride), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def config_for(d: int, window: int) -> Config:
    return CONFIGS[d, window <= NARROW]


def forward(q, k, v, window: int, start: Tensor | None, softmax_scale: float, config: Config) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D) and the base-2 log-sum-exp (B, H, T). start: (B, T) int32, the first token of each token's document."""
    batch, length, heads, d = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, length, device=q.device, dtype=torch.float32)
    share = heads // k.shape[2]
    pack = config.forward.packed(share)
    kernels.attention_forward[(triton.cdiv(length, config.forward.queries // pack), heads // pack, batch)](
        q, k, v, start, o, lse, length, heads, share, min(window, length), *_strides(q), *_strides(k), *_strides(v),
        softmax_scale * math.log2(math.e), D=d, PACK=pack, DOCUMENTS=start is not None, DT=_TYPES[q.dtype], **config.forward.options(),
    )  # fmt: skip
    return o, lse


def backward(q, k, v, o, lse, do, window: int, start: Tensor | None, end: Tensor | None, softmax_scale: float, config: Config):
    """dq, dk, dv. end: (B, T) int32, one past the last token of each token's document."""
    batch, length, heads, d = q.shape
    if config.onepass is not None and not torch.are_deterministic_algorithms_enabled():
        return _one_pass(q, k, v, o, lse, do, window, start, end, softmax_scale, *config.onepass)
    groups = k.shape[2]
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    dot = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    sizes = (length, heads, heads // groups, min(window, length), *_strides(q), *_strides(k), *_strides(v), *_strides(do))
    scales = (softmax_scale, softmax_scale * math.log2(math.e))
    fixed = {"D": d, "DOCUMENTS": start is not None, "DT": _TYPES[q.dtype]}
    pack = config.dq.packed(heads // groups)
    kernels.attention_dq[(triton.cdiv(length, config.dq.queries // pack), heads // pack, batch)](
        q, k, v, do, o, start, lse, dot, dq, *sizes, *scales, PACK=pack, **fixed, **config.dq.options()
    )
    anchor = lse if start is None else start  # the kernel offsets this pointer before it knows whether it is needed
    kernels.attention_dkv[(triton.cdiv(length, config.dkv.keys), groups, batch)](
        q, k, v, do, anchor, end, lse, dot, dk, dv, *sizes, *scales, **fixed, **config.dkv.options()
    )
    return dq, dk, dv


def _one_pass(q, k, v, o, lse, do, window: int, start, end, softmax_scale: float, tile: Tile, add: int):
    batch, length, heads, d = q.shape
    groups = k.shape[2]
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    dot = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    padded = (length + 3) // 4 * 4  # a descriptor's rows begin at multiples of 16 bytes
    shape = (batch * heads * d, padded) if add == 3 else (batch * heads * length, d)
    sums = torch.empty(shape, device=q.device, dtype=torch.float32)
    grid = (triton.cdiv(length, 64), heads, batch)
    onepass.row_dots[grid](do, o, dot, sums, length, heads, padded, *_strides(do), D=d, BM=64, ADD=add, num_warps=4)
    block = [d, tile.queries] if add == 3 else [tile.queries, d]
    onepass.attention_gradients[(triton.cdiv(length, tile.keys), groups, batch)](
        *(TensorDescriptor.from_tensor(x, [1, tile.queries, 1, d]) for x in (q, do)), k, v, lse if start is None else start, end, lse, dot,
        TensorDescriptor.from_tensor(sums, block) if add > 1 else sums, dk, dv,
        length, heads, heads // groups, min(window, length), *_strides(k), *_strides(v),
        softmax_scale, softmax_scale * math.log2(math.e), D=d, DOCUMENTS=start is not None, ADD=add, DT=_TYPES[q.dtype], **tile.options(),
    )  # fmt: skip
    onepass.finish_dq[grid](sums, dq, length, heads, padded, softmax_scale, D=d, BM=64, ADD=add, num_warps=4)
    return dq, dk, dv
