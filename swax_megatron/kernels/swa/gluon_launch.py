"""Launches of the Gluon kernels (Hopper) and the table of their tile sizes. No autograd here (see `triton_op.py`)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launching import Blocks, Launches
from . import gluon_dkv, gluon_dq, gluon_forward, gluon_onepass

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_LOG2_E = math.log2(math.e)
_DOTS_ROWS = 64  # queries a program of the passes around the gradients; the sums' rows are padded to it


class Queries(NamedTuple):
    """A kernel that walks over tiles of queries: keys a block, blocks in flight, most heads packed into a tile."""

    keys: int
    stages: int
    pack: int


class Keys(NamedTuple):
    """A kernel that walks over tiles of keys: queries a block, keys a tile, blocks in flight."""

    queries: int
    keys: int
    stages: int


class Sizes(NamedTuple):
    forward: Queries
    dq: Queries
    dkv: Keys
    onepass: Keys | None  # instead of dq and dkv where the result need not be deterministic


NARROW = 512  # windows up to this have few key blocks a query: tiles pack heads, and dq is not worth adding up in memory
_NARROW = Sizes(Queries(64, 3, 4), Queries(64, 3, 4), Keys(32, 128, 4), None)
_WIDE = Sizes(Queries(128, 2, 1), Queries(64, 3, 4), Keys(64, 128, 4), Keys(64, 128, 2))
SIZES = {(64, True): _NARROW, (64, False): _WIDE, (128, True): _NARROW, (128, False): _WIDE}  # (head size, window <= NARROW)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fitting(x: Tensor) -> Tensor:
    """x itself where a tensor descriptor can hold it (dense last dimension, steps of 16 bytes), else a copy."""
    unit = 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n > 0 and n % unit == 0 for n in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _blocks(x: Tensor, *block: int) -> Blocks:
    return Blocks(x, x.shape, x.stride(), block)


def _described(x: Blocks) -> TensorDescriptor:
    block, dtype = list(x.block), _TYPES.get(x.base.dtype, gl.float32)
    return TensorDescriptor(x.base, list(x.shape), list(x.strides), block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D) and the base-2 log-sum-exp (B, H, T). start: (B, T) int32, the first token of each token's document."""
    batch, length, heads, d = q.shape
    q, k, v = _fitting(q), _fitting(k), _fitting(v)
    share, sizes = heads // k.shape[2], SIZES[d, window <= NARROW].forward
    keys, stages, pack = sizes
    pack = math.gcd(pack, share)
    o = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, length, device=q.device, dtype=torch.float32)
    tiles, rows = triton.cdiv(length, 128 // pack), (1, 64 // pack, pack, d)
    launch = Launches(("gluon forward", d, sizes, pack), (), (q, start), _described)
    launch(
        gluon_forward.attention_forward,
        (min(_processors(q.device), batch * heads // pack * tiles), 1, 1),
        (_blocks(q, *rows), _blocks(k, 1, keys, 1, d), _blocks(v, 1, keys, 1, d), _blocks(o, *rows), start, lse,
         length, heads, share, batch, min(window, length), tiles, softmax_scale * _LOG2_E),
        {"STAGES": stages, "DOCUMENTS": start is not None, "num_warps": 4},
    )  # fmt: skip
    launch.finish()
    return o, lse


def backward(q, k, v, o, lse, do, window: int, start: Tensor | None, end: Tensor | None, softmax_scale: float):
    """dq, dk, dv. end: (B, T) int32, one past the last token of each token's document."""
    q, k, v, do = _fitting(q), _fitting(k), _fitting(v), _fitting(do)
    grads = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v)]
    sizes = SIZES[q.shape[-1], window <= NARROW]
    once = sizes.onepass is not None and not torch.are_deterministic_algorithms_enabled()
    (_one_pass if once else _two_passes)(q, k, v, o, lse, do, *grads, min(window, q.shape[1]), start, end, softmax_scale, sizes)
    return tuple(grads)


def _two_passes(q, k, v, o, lse, do, dq, dk, dv, window, start, end, softmax_scale, sizes: Sizes) -> None:
    batch, length, heads, d = q.shape
    groups = k.shape[2]
    share, (keys, stages, pack) = heads // groups, sizes.dq
    pack = math.gcd(pack, share)
    scales = softmax_scale, softmax_scale * _LOG2_E
    dot = torch.empty_like(lse)
    tiles, rows = triton.cdiv(length, 128 // pack), (1, 64 // pack, pack, d)
    launch = Launches(("gluon backward", d, sizes, pack), (), (q, o, start, end, lse), _described)
    launch(
        gluon_dq.attention_dq,
        (min(_processors(q.device), batch * heads // pack * tiles), 1, 1),
        (_blocks(q, *rows), _blocks(do, *rows), _blocks(k, 1, keys, 1, d), _blocks(v, 1, keys, 1, d), _blocks(dq, *rows),
         o, start, lse, dot, length, heads, share, batch, window, tiles, *scales),
        {"STAGES": stages, "DOCUMENTS": start is not None, "num_warps": 4},
    )  # fmt: skip
    queries, keys, stages = sizes.dkv
    tiles, half = triton.cdiv(length, keys), (1, keys // 2, 1, d)
    launch(
        gluon_dkv.attention_dkv,
        (min(_processors(q.device), batch * groups * tiles), 1, 1),
        (_blocks(q, 1, queries, 1, d), _blocks(do, 1, queries, 1, d), *(_blocks(x, *half) for x in (k, v, dk, dv)), end, lse, dot,
         length, heads, share, groups, batch, window, tiles, *scales),
        {"STAGES": stages, "DOCUMENTS": end is not None, "num_warps": 4},
    )  # fmt: skip
    launch.finish()


def _one_pass(q, k, v, o, lse, do, dq, dk, dv, window, start, end, softmax_scale, sizes: Sizes) -> None:
    batch, length, heads, d = q.shape
    groups, (queries, keys, stages) = k.shape[2], sizes.onepass
    dot = torch.empty_like(lse)
    grid = (triton.cdiv(length, _DOTS_ROWS), heads, batch)
    padded = grid[0] * _DOTS_ROWS
    sums = torch.empty(batch * heads * padded, d, device=q.device, dtype=torch.float32)
    launch = Launches(("gluon one pass", d, sizes), (do,), (q, o, end, lse), _described)
    whole = {"D": d, "BM": _DOTS_ROWS, "num_warps": 4}
    launch(gluon_onepass.row_dots, grid, (do, o, dot, sums, length, padded, heads, *do.stride()[:3]), whole)
    launch(
        gluon_onepass.attention_gradients,
        (triton.cdiv(length, keys) * groups, batch, 1),
        (_blocks(q, 1, queries, 1, d), _blocks(do, 1, queries, 1, d), *(_blocks(x, 1, keys, 1, d) for x in (k, v, dk, dv)),
         _blocks(sums, queries, d), end, lse, dot, length, padded, heads, heads // groups, groups, window,
         softmax_scale, softmax_scale * _LOG2_E),
        {"STAGES": stages, "DOCUMENTS": end is not None, "num_warps": 8},
    )  # fmt: skip
    launch(gluon_onepass.finish_dq, grid, (sums, dq, length, padded, heads, softmax_scale), whole)
    launch.finish()
