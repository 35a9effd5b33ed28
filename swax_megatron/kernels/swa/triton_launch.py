"""Launches of the sliding-window attention kernels and the table of tile sizes. No autograd here (see `triton_op.py`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from . import triton_kernels as kernels


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


NARROW = 512  # windows up to this use the first table: few key blocks a query, no loop for the unmasked ones
_NARROW = Config(Tile(64, 32, 4, False, 4, 3), Tile(64, 32, 4, False, 4, 2), Tile(32, 64, 1, False, 4, 3))
_WIDE = Config(Tile(128, 64, 4, True, 8, 3), Tile(64, 64, 2, True, 4, 2), Tile(32, 64, 1, True, 4, 3))
CONFIGS: dict[tuple[int, bool], Config] = {  # (head size, window <= NARROW)
    (64, True): _NARROW,
    (64, False): _WIDE,
    (128, True): _NARROW,
    (128, False): _WIDE,
}

_LOG2_E = math.log2(math.e)
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _rows(x: Tensor) -> Tensor:
    """x itself when its last dimension is dense (the kernels take any other stride), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def config_for(d: int, window: int) -> Config:
    return CONFIGS[d, window <= NARROW]


def in_gluon(q: Tensor) -> bool:
    """Whether `gluon_launch.py` runs instead: on a GPU, with the Triton it was tested with (Gluon is experimental there)."""
    return q.is_cuda and launching.TESTED


def forward(q, k, v, window: int, start: Tensor | None, softmax_scale: float, config: Config) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D) and the base-2 log-sum-exp (B, H, T). start: (B, T) int32, the first token of each token's document."""
    if in_gluon(q):
        from . import gluon_launch

        return gluon_launch.forward(q, k, v, window, start, softmax_scale)
    batch, length, heads, d = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, length, device=q.device, dtype=torch.float32)
    share, tile = heads // k.shape[2], config.forward
    pack = tile.packed(share)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    kernels.attention_forward[triton.cdiv(length, tile.queries // pack), heads // pack, batch](
        *(q, k, v, start, o, lse, length, heads, share, min(window, length), *strides, softmax_scale * _LOG2_E),
        **{"D": d, "PACK": pack, "DOCUMENTS": start is not None, "DT": _TYPES[q.dtype], **tile.options()},
    )
    return o, lse


def backward(q, k, v, o, lse, do, window: int, start: Tensor | None, end: Tensor | None, softmax_scale: float, config: Config):
    """dq, dk, dv. end: (B, T) int32, one past the last token of each token's document."""
    if in_gluon(q):
        from . import gluon_launch

        return gluon_launch.backward(q, k, v, o, lse, do, window, start, end, softmax_scale)
    batch, length, heads, d = q.shape
    groups = k.shape[2]
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    dot = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    sizes = (length, heads, heads // groups, min(window, length), *strides, softmax_scale, softmax_scale * _LOG2_E)
    fixed = {"D": d, "DOCUMENTS": start is not None, "DT": _TYPES[q.dtype]}
    pack = config.dq.packed(heads // groups)
    kernels.attention_dq[triton.cdiv(length, config.dq.queries // pack), heads // pack, batch](
        *(q, k, v, do, o, start, lse, dot, dq, *sizes), **{"PACK": pack, **fixed, **config.dq.options()}
    )
    anchor = lse if start is None else start  # the kernel offsets this pointer before it knows whether it is needed
    kernels.attention_dkv[triton.cdiv(length, config.dkv.keys), groups, batch](
        *(q, k, v, do, anchor, end, lse, dot, dk, dv, *sizes), **{**fixed, **config.dkv.options()}
    )
    return dq, dk, dv
