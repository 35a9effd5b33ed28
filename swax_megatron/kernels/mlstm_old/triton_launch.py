"""Launches of the mLSTM's Triton kernels: scratch, grids and the table of tile sizes. No autograd here (see `triton_op.py`).

Legend: b batch, t time, h heads, k = d_qk, v = d_v, c chunk; TP = C * LC padded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_cell as cell
from . import triton_gates as gates
from . import triton_march as march
from . import triton_norm as norm


class Tile(NamedTuple):
    """Tile sizes of one kernel, its warps and its software-pipeline depth."""

    sizes: dict[str, int]
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Config:
    """Every kernel's tiles for one shape class (d_qk, d_v). chunk: tokens between two saved states; block: rows of a pair block."""

    chunk: int
    block: int
    updates: Tile
    scores: Tile
    outputs: Tile
    pairs: Tile
    gradients: Tile
    scan_block: int = 1024
    march: Tile | None = None  # one kernel for the states of all chunks instead of two (`triton_march.py`)


def _config(chunk: int, block: int, d_qk: int, d_v: int, outputs: Tile, gradients: Tile) -> Config:
    pairs = Tile({"BD": 64}, 8, 4)
    updates = Tile({"BK": 64, "BV": min(d_v, 256), "BT": 64}, 4, 2)
    return Config(chunk=chunk, block=block, updates=updates, scores=pairs, outputs=outputs, pairs=pairs, gradients=gradients)


def _combined(rows: int, columns: int, warps: int, stages: int) -> Tile:
    return Tile({"BM": rows, "BN": columns, "BS": 64, "BD": 64}, warps, stages)


# The fastest of those tried on an H100 (docs/kernels.md); each was checked there against float64, gradients included.
CONFIGS: dict[tuple[int, int], Config] = {
    (64, 64): _config(128, 128, 64, 64, _combined(64, 64, 4, 2), _combined(64, 64, 4, 2)),
    (64, 128): _config(128, 128, 64, 128, _combined(64, 128, 4, 2), _combined(64, 64, 4, 2)),
    (128, 256): _config(256, 128, 128, 256, _combined(128, 128, 8, 3), _combined(128, 256, 8, 3)),
    (256, 512): _config(256, 128, 256, 512, _combined(128, 128, 8, 3), _combined(128, 256, 8, 3)),
}

# The type of the products' operands and of saved states. float16 inputs are rounded to bfloat16 there: a state may exceed 65,504.
_PRODUCT = {
    torch.bfloat16: (tl.bfloat16, torch.bfloat16),
    torch.float16: (tl.bfloat16, torch.bfloat16),
    torch.float32: (tl.float32, torch.float32),
}


def rows(x: Tensor) -> Tensor:
    """x itself when its last dimension is dense (the kernels take any other stride), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


class Saved(NamedTuple):
    """What the backward pass needs besides inputs and h. tokens: (6, B*H, TP) float32 = row, col, m, wq, wk, den."""

    tokens: Tensor
    decay: Tensor
    states: Tensor
    norms: Tensor


def forward(q, k, v, igate, fgate, start, c0, n0, m0, want_state: bool, gate_cap: float, eps: float, config: Config):
    """h (B, T, H, V), the final state (or three empty tensors) and `Saved`. start: (B, T) int32 first token of each token's document."""
    batch, length, heads, d_qk = q.shape
    d_v, bh, lc = v.shape[-1], batch * heads, config.chunk
    chunks = triton.cdiv(length, lc)
    q, k, v = rows(q), rows(k), rows(v)
    dt, product = _PRODUCT[q.dtype]
    scale, documents = d_qk**-0.5, start is not None

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device=q.device, dtype=dtype)

    tokens, raw = empty(6, bh, chunks * lc), empty(3, bh, chunks * lc)
    summary = empty(bh, chunks), empty(bh, chunks)  # apart: a slice at an odd offset would be another kernel to compile
    decay, m_end = empty(bh, chunks), empty(batch, heads)
    row, col, mt, wq, wk, den = tokens
    per_chunk = (chunks, bh)
    gates.chunk_gates[per_chunk](
        igate, fgate, start, *raw, *summary, length, heads, chunks, *_strides(igate), *_strides(fgate), gate_cap,
        LC=lc, DOCUMENTS=documents, num_warps=4,
    )  # fmt: skip
    gates.token_weights[per_chunk](
        *raw, *summary, m0, start, row, col, mt, wq, wk, decay, m_end, length, heads, chunks, scale,
        LC=lc, SUMMARIES=128, DOCUMENTS=documents, INITIAL=m0 is not None, num_warps=4,
    )  # fmt: skip

    c_end, n_end = (empty(batch, heads, d_qk, d_v), empty(batch, heads, d_qk)) if want_state else (empty(0), empty(0))
    states, norms, _ = _scanned(k, v, wk, wk, decay, (c0, n0), (c_end, n_end), None, config)

    blocks, padded = lc // config.block, chunks * lc
    p, den_parts = empty(bh, chunks, lc, lc, dtype=product), empty(bh, blocks, padded)
    size = (length, heads, chunks)
    cell.pair_scores[(blocks * (blocks + 1) // 2, chunks, bh)](
        q, k, row, col, wq, norms, start, p, den_parts, *size, *_strides(q), *_strides(k), scale,
        K=d_qk, LC=lc, BT=config.block, DOCUMENTS=documents, DT=dt, **config.scores.options(),
    )  # fmt: skip
    h = torch.empty(batch, length, heads, d_v, device=q.device, dtype=v.dtype)
    tile = config.outputs.sizes
    cell.combine_outputs[(padded // tile["BM"] * (d_v // tile["BN"]), bh)](
        q, v, p, states, wq, den_parts, mt, h, den, *size, *_strides(q), *_strides(v), eps,
        K=d_qk, V=d_v, LC=lc, BLOCKS=blocks, DT=dt, **config.outputs.options(),
    )  # fmt: skip
    return h, c_end, n_end, m_end if want_state else empty(0), Saved(tokens, decay, states, norms)


def _scanned(x, y, weight, norm_weight, decay, start, end, others: tuple[Tensor, Tensor] | None, config: Config):
    """The state before every chunk (from others' end when `others`, the saved states, are given: then these are gradients).

    start, end: the (C, n) to begin with (or two None) and to fill (empty: not wanted). Returns states, norms, and what passed.
    """
    batch, length, heads, d_k = x.shape
    d_v, bh, chunks = y.shape[-1], batch * heads, decay.shape[1]
    dt, product = _PRODUCT[x.dtype]
    states = torch.empty(bh, chunks, d_k, d_v, device=x.device, dtype=product)
    norms = torch.empty(bh, chunks, d_k, device=x.device, dtype=torch.float32)
    if config.march is not None:
        return _marched(x, y, weight, norm_weight, decay, states, norms, start, end, others, config)
    tile = config.updates.sizes
    cell.chunk_updates[(d_k // tile["BK"] * (d_v // tile["BV"]), chunks, bh)](
        x, y, weight, norm_weight, states, norms, length, heads, chunks, *_strides(x), *_strides(y),
        K=d_k, V=d_v, LC=config.chunk, DT=dt, **config.updates.options(),
    )  # fmt: skip
    tiles = d_k * d_v // config.scan_block + 1
    passed = None if others is None else torch.empty(bh, chunks, tiles, device=x.device, dtype=torch.float32)
    cell.scan_states[(tiles, bh)](
        states, norms, decay, *start, *(others or (states, norms)), *end, norms if passed is None else passed, chunks,
        K=d_k, V=d_v, BLOCK=config.scan_block, START=start[0] is not None, END=end[0].numel() > 0, REVERSE=others is not None,
        num_warps=8 if others is None else 2,
    )  # fmt: skip
    return states, norms, passed


def _marched(x, y, weight, norm_weight, decay, states, norms, start, end, others, config: Config):
    batch, length, heads, d_k = x.shape
    d_v, bh, chunks = y.shape[-1], batch * heads, decay.shape[1]
    tile = config.march.sizes
    tiles = d_k // tile["BK"] * (d_v // tile["BV"] + 1)
    passed = None if others is None else torch.empty(bh, chunks, tiles, device=x.device, dtype=torch.float32)
    march.march_states[(tiles, bh)](
        x, y, weight, norm_weight, decay, states, norms, *start, *(others or (states, norms)), *end, norms if passed is None else passed,
        length, heads, chunks, *_strides(x), *_strides(y), K=d_k, V=d_v, LC=config.chunk, DT=_PRODUCT[x.dtype][0],
        START=start[0] is not None, END=end[0].numel() > 0, REVERSE=others is not None, **config.march.options(),
    )  # fmt: skip
    return states, norms, passed


def backward(q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end, saved: Saved, want_initial: bool, gate_cap, eps, config: Config):
    """Gradients of q, k, v, igate, fgate, and of the initial (C, n) (or two empty tensors). dot: <dh, h> (B, T, H) if known."""
    batch, length, heads, d_qk = q.shape
    d_v, bh, lc, block = v.shape[-1], batch * heads, config.chunk, config.block
    chunks, blocks = saved.decay.shape[1], lc // block
    q, k, v, dh = rows(q), rows(k), rows(v), rows(dh)
    dt, product = _PRODUCT[q.dtype]
    scale, documents = d_qk**-0.5, start is not None
    row, col, mt, wq, wk, den = saved.tokens
    size, padded = (length, heads, chunks), chunks * lc

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device=q.device, dtype=dtype)

    rn, delta, wd, wdd, diagonal, rq, rk = empty(7, bh, padded)
    row_block = min(32, block)
    cell.row_terms[(padded // row_block, bh)](
        dh, h, dot, den, mt, wq, rn, delta, wd, wdd, *size, *_strides(dh), eps,
        V=d_v, LC=lc, BT=row_block, DOT=dot is not None, num_warps=4,
    )  # fmt: skip
    dc0, dn0 = (empty(batch, heads, d_qk, d_v), empty(batch, heads, d_qk)) if want_initial else (empty(0), empty(0))
    others = (saved.states, saved.norms)
    d_states, d_norms, passed = _scanned(q, dh, wd, wdd, saved.decay, (dc_end, dn_end), (dc0, dn0), others, config)

    p, ds = empty(2, bh, chunks, lc, lc, dtype=product)
    row_sum, col_sum = empty(2, bh, blocks, padded)
    cell.pair_gradients[(blocks * (blocks + 1) // 2, chunks, bh)](
        q, k, v, dh, row, col, rn, delta, start, p, ds, row_sum, col_sum, diagonal,
        *size, *_strides(q), *_strides(k), *_strides(v), *_strides(dh), scale,
        K=d_qk, V=d_v, LC=lc, BT=block, DOCUMENTS=documents, DT=dt, **config.pairs.options(),
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    tile = config.gradients.sizes
    cell.combine_gradients[(padded // tile["BM"] * (2 + d_v // tile["BN"]), bh)](
        q, k, v, dh, p, ds, saved.states, saved.norms, d_states, d_norms, wd, wdd, wk, dq, dk, dv, rq, rk,
        *size, *_strides(q), *_strides(k), *_strides(v), *_strides(dh), K=d_qk, V=d_v, LC=lc, DT=dt, **config.gradients.options(),
    )  # fmt: skip
    di, df = empty(batch, length, heads), empty(batch, length, heads)
    gates.gate_gradients[(chunks, bh)](
        igate, fgate, start, row_sum, col_sum, diagonal, rq, rk, passed, di, df,
        *size, passed.shape[-1], *_strides(igate), *_strides(fgate), gate_cap,
        LC=lc, BLOCKS=blocks, TILE_BLOCK=64, DOCUMENTS=documents, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, di, df, dc0, dn0


def norm_gate_forward(h: Tensor, ogate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y (B, T, H, V) in the gate's dtype and layout. ogate (B, T, H, V), any strides but the last; weight (H * V)."""
    batch, length, heads, d_v = h.shape
    ogate = rows(ogate)
    y = torch.empty_like(ogate)
    total = batch * length * heads
    norm.norm_gate[(triton.cdiv(total, 8),)](
        h, ogate, weight, y, total, length, heads, *_strides(ogate), *_strides(y), eps, V=d_v, BR=8, num_warps=4
    )
    return y


def norm_gate_backward(dy: Tensor, h: Tensor, ogate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh, dogate (B, T, H, V), dweight (H * V), and <dh, h> (B, T, H)."""
    batch, length, heads, d_v = h.shape
    dy, ogate = rows(dy), rows(ogate)
    dh = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    dogate = torch.empty_like(ogate)
    dot = torch.empty(h.shape[:3], device=h.device, dtype=torch.float32)
    block = min(8, 2048 // d_v)  # rows at a time: with more a thread has no registers left
    programs = max(1, min(512 // heads, triton.cdiv(batch * length, block)))
    partial = torch.empty(programs, heads * d_v, device=h.device, dtype=torch.float32)
    norm.norm_gate_gradients[(programs, heads)](
        dy, h, ogate, weight, dh, dogate, dot, partial,
        batch * length, length, heads, *_strides(dy), *_strides(ogate), *_strides(dogate), eps, V=d_v, BR=block, num_warps=4,
    )  # fmt: skip
    return dh, dogate, partial.sum(0).to(weight.dtype), dot
