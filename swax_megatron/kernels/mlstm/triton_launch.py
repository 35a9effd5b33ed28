"""Launches of the mLSTM's Triton kernels: scratch, grids and the table of tile sizes. No autograd here (see `triton_op.py`).

Legend: b batch, t time, h heads, k = d_qk, v = d_v, c chunk; TP = C * LC padded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..launching import Launches, overlaps, padded
from . import triton_cell as cell
from . import triton_gates as gates
from . import triton_norm as norm
from . import triton_states as recurrence
from .triton_step import decode_normaliser, decode_step


class Tile(NamedTuple):
    """Tile sizes of one kernel, its warps and its software-pipeline depth."""

    sizes: dict[str, int]
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True, eq=False)  # one identity per table entry: part of the key that compiled kernels are kept under
class Config:
    """Every kernel's tiles for one shape class (d_qk, d_v). chunk: tokens between two saved states.

    Two blocks of pairs (BT) must cover the rows (BM) of a tile of gradients.
    """

    chunk: int
    scores: Tile | None  # of a kernel for P, or None: `outputs` computes P where it needs it
    outputs: Tile
    updates: Tile
    pairs: Tile
    gradients: Tile
    scan: Tile
    scan_back: Tile
    keep: bool  # P/n in memory between the pairs and dv, or computed again


def _config(chunk: int, scores: tuple | None, outputs: tuple, updates: tuple, pairs: tuple, gradients: tuple, keep: bool) -> Config:
    """Each tile: sizes, warps, stages."""
    rows, pair = ("BM", "BN", "BS", "BD"), ("BT", "BD")
    names, tiles = (pair, rows, ("BK", "BV", "BT", "GROUP"), pair, rows), (scores, outputs, updates, pairs, gradients)
    each = [t and Tile(dict(zip(n, t, strict=False)), *t[len(n) :]) for n, t in zip(names, tiles, strict=True)]
    return Config(chunk, *each, Tile({"BLOCK": 512}, 4, 1), Tile({"BLOCK": 1024}, 2, 1), keep)


# The fastest of those that `benchmarks/mlstm_tiles.py` tried on an H200 (docs/kernels.md); each was checked against float64, gradients
# included. P/n is kept where dv is fastest so; computed again it saves B*H*T*chunk numbers at the peak.
CONFIGS: dict[tuple[int, int], Config] = {
    (64, 64): _config(128, None, (64, 64, 32, 64, 4, 3), (64, 64, 64, 2, 4, 3), (64, 64, 4, 3), (64, 64, 32, 32, 4, 3), False),
    (64, 128): _config(128, None, (64, 128, 32, 64, 4, 3), (64, 128, 64, 2, 4, 3), (64, 64, 4, 3), (64, 128, 32, 32, 4, 3), False),
    (128, 256): _config(256, None, (64, 256, 32, 32, 4, 3), (64, 128, 64, 2, 4, 3), (64, 64, 4, 4), (128, 256, 64, 64, 8, 3), False),
    (256, 512): _config(
        256, (64, 64, 4, 3), (128, 128, 64, 64, 8, 3), (128, 128, 64, 4, 8, 3), (64, 64, 4, 4), (128, 256, 64, 64, 8, 3), True
    ),
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


class Saved(NamedTuple):
    """What the backward pass needs besides inputs and h: states (B*H, C, K, V) before each chunk, and one float32 buffer (`_parts`)."""

    scalars: Tensor
    states: Tensor


def _parts(bh: int, chunks: int, lc: int, d_qk: int) -> list[int]:
    """Numbers of row, col, wq, wk, 1/n, side (a token each), decay (a chunk) and the normalisers of states (d_qk a chunk)."""
    return [bh * chunks * lc] * 6 + [bh * chunks, bh * chunks * d_qk]


def saved_sizes(batch: int, length: int, heads: int, d_qk: int, d_v: int, chunk: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `Saved`."""
    bh, chunks = batch * heads, -(-length // chunk)
    return (sum(map(padded, _parts(bh, chunks, chunk, d_qk))),), (bh, chunks, d_qk, d_v)


@lru_cache
def _constants(config: Config, d_qk: int, d_v: int, dtype: torch.dtype, documents: bool, initial: bool, end: bool, back: bool, pdl: bool):
    """The constexpr arguments and options of every kernel. pdl: launched as dependents of the kernel before (`dependent.py`)."""
    size, dt = {"K": d_qk, "V": d_v, "LC": config.chunk}, {"DT": _PRODUCT[dtype][0]}
    flags = {"START": initial, "END": end, "REVERSE": back}
    scan = (config.scan_back if back else config.scan).options()
    updates = {**size, "BACK": back, **dt, **config.updates.options()}
    blocks = 0 if config.scores is None else config.chunk // config.scores.sizes["BT"]
    made = dict(
        gates={"LC": config.chunk, "DOCUMENTS": documents, "num_warps": 4},
        weights={"LC": config.chunk, "SUMMARIES": 128, "DOCUMENTS": documents, "INITIAL": initial, "num_warps": 4},
        updates={**updates, "DOT": False},
        updates_given={**updates, "DOT": True},
        scores=config.scores and {"K": d_qk, "LC": config.chunk, "DOCUMENTS": documents, **dt, **config.scores.options()},
        scan={"K": d_qk, "V": d_v, **flags, **scan},
        outputs={**size, "BLOCKS": blocks, "DOCUMENTS": documents, **dt, **config.outputs.options()},
        pairs={**size, "KEEP": config.keep, "DOCUMENTS": documents, **dt, **config.pairs.options()},
        gradients={**size, "KEEP": config.keep, "DOCUMENTS": documents, **dt, **config.gradients.options()},
        gate_gradients={
            "LC": config.chunk, "BLOCKS": config.chunk // config.pairs.sizes["BT"], "TILE_BLOCK": 64, "DOCUMENTS": documents, "num_warps": 4
        },
    )  # fmt: skip
    launched = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    return SimpleNamespace(**{name: each and {**each, **launched} for name, each in made.items()})


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def forward(q, k, v, igate, fgate, start, c0, n0, m0, want_state: bool, gate_cap: float, eps: float, config: Config):
    """h (B, T, H, V), the final state (or three None) and `Saved`. start: (B, T) int32 first token of each token's document."""
    batch, length, heads, d_qk = q.shape
    d_v, bh, lc = v.shape[-1], batch * heads, config.chunk
    chunks = -(-length // lc)
    q, k, v = rows(q), rows(k), rows(v)
    launch = Launches(("forward", config, d_qk, d_v, want_state), (q, k, v, igate, fgate, start, c0, n0, m0))
    constants = _constants(config, d_qk, d_v, q.dtype, start is not None, c0 is not None, want_state, False, overlaps(q.device))
    at = launch.pointer

    tokens, scale = bh * chunks * lc, d_qk**-0.5
    parts, scratch = _parts(bh, chunks, lc, d_qk), [tokens] * 4 + [bh * chunks] * 2 + [bh]
    blocks, product = constants.outputs["BLOCKS"], _PRODUCT[q.dtype][1]
    scratch += [tokens * blocks, tokens * lc * product.itemsize // 4 if blocks else 0]
    saved, spare = _float32(q, sum(map(padded, parts))), _float32(q, sum(map(padded, scratch)))
    row, col, wq, wk, rn, side, decay, norms = launch.regions(saved, parts)
    b, ig, top, mt, total, summit, m_last, den, p = launch.regions(spare, scratch)
    p = p if launch.direct else p.view(product)
    c_end = n_end = m_end = None
    if want_state:
        c_end, n_end, m_end = (_float32(q, batch, heads, *rest) for rest in ((d_qk, d_v), (d_qk,), ()))
    states = torch.empty((bh, chunks, d_qk, d_v), dtype=product, device=q.device)
    h = torch.empty((batch, length, heads, d_v), dtype=v.dtype, device=q.device)
    start_at, i_at, f_at, q_at, k_at, v_at = at(start), at(igate), at(fgate), at(q), at(k), at(v)
    size, by_q, by_k, by_v = (length, heads, chunks), q.stride()[:3], k.stride()[:3], v.stride()[:3]

    launch(
        gates.chunk_gates, (chunks, bh, 1),
        (i_at, f_at, start_at, b, ig, top, total, summit, *size, *igate.stride(), *fgate.stride(), gate_cap), constants.gates,
    )  # fmt: skip
    launch(
        gates.token_weights, (chunks, bh, 1),
        (b, ig, top, total, summit, at(m0), start_at, row, col, mt, wq, wk, decay, at(m_end) if want_state else m_last, *size, scale),
        constants.weights,
    )  # fmt: skip
    _states(
        launch, constants.updates, constants.scan, config, (k_at, v_at, wk, wk, wk, wk, wk, wk), decay, at(states), norms,
        (at(c0), at(n0)), (at(states), norms), (at(c_end), at(n_end)), decay, (batch, *size, d_qk, d_v), (*by_k, *by_v),
    )  # fmt: skip
    if blocks:
        launch(
            cell.pair_scores, (blocks * (blocks + 1) // 2, chunks, bh),
            (q_at, k_at, row, col, wq, norms, start_at, p, den, *size, *by_q, *by_k, scale), constants.scores,
        )  # fmt: skip
    tile = config.outputs.sizes
    launch(
        cell.outputs, (chunks * lc // tile["BM"] * (d_v // tile["BN"]), bh, 1),
        (
            q_at, k_at, v_at, p, den, at(states), norms, row, col, mt, wq, start_at, at(h), rn, side,
            *size, *by_q, *by_k, *by_v, scale, eps,
        ),
        constants.outputs,
    )  # fmt: skip
    launch.finish()
    return h, c_end, n_end, m_end, Saved(saved, states)


def passed_tiles(config: Config, d_qk: int, d_v: int) -> int:
    """Parts of the sum of gradient times state that passes through a chunk."""
    return d_qk * d_v // config.scan_back.sizes["BLOCK"] + 1


def _states(launch, updates, scan, config: Config, operands, decay, states, norms, begin, others, end, passed, shape, strides) -> None:
    """The state before every chunk, in place, or its gradient.

    updates, scan: constants; operands: x, y, weights, 1/n, side, h, <dh, h>, delta; begin, end: (C, n) or None.
    """
    batch, length, heads, chunks, d_k, d_v = shape
    size, bh, tile = (length, heads, chunks), batch * heads, config.updates.sizes
    grid = d_k // tile["BK"] * (d_v // tile["BV"]) + tile["GROUP"], -(-chunks // tile["GROUP"]), bh
    launch(recurrence.chunk_updates, grid, (*operands, states, norms, *size, *strides), updates)
    grid = d_k * d_v // scan["BLOCK"] + 1, bh, 1
    launch(recurrence.scan_states, grid, (states, norms, decay, *begin, *others, *end, passed, chunks), scan)


def backward(q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end, saved: Saved, want_initial: bool, gate_cap, eps, config: Config):
    """Gradients of q, k, v, igate, fgate, and of the initial (C, n) (or two None). dot: <dh, h> (B, T, H) if known."""
    batch, length, heads, d_qk = q.shape
    d_v, bh, lc = v.shape[-1], batch * heads, config.chunk
    chunks, blocks = -(-length // lc), lc // config.pairs.sizes["BT"]
    q, k, v, dh = rows(q), rows(k), rows(v), rows(dh)
    given = (q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end)
    launch = Launches(("backward", config, d_qk, d_v, want_initial), given)
    constants = _constants(config, d_qk, d_v, q.dtype, start is not None, dc_end is not None, want_initial, True, overlaps(q.device))
    at, dtype, device = launch.pointer, _PRODUCT[q.dtype][1], q.device

    tokens, tiles = bh * chunks * lc, passed_tiles(config, d_qk, d_v)
    scratch = [tokens] * 4 + [tokens * blocks] * 2 + [bh * chunks * d_qk, bh * chunks * tiles]
    scratch += [n * dtype.itemsize // 4 for n in (tokens * lc, config.keep * tokens * lc, bh * chunks * d_qk * d_v)]
    spare = _float32(q, sum(map(padded, scratch)))
    row, col, wq, wk, rn, side, decay, norms = launch.regions(saved.scalars, _parts(bh, chunks, lc, d_qk))
    delta, diagonal, rq, rk, row_sum, col_sum, d_norms, passed, *matrices = launch.regions(spare, scratch)
    ds, p, d_states = matrices if launch.direct else (x.view(dtype) for x in matrices)
    start_at, i_at, f_at, q_at, k_at, v_at, g_at = at(start), at(igate), at(fgate), at(q), at(k), at(v), at(dh)
    size = length, heads, chunks
    by_q, by_k, by_v, by_g = q.stride()[:3], k.stride()[:3], v.stride()[:3], dh.stride()[:3]

    dc0, dn0 = (_float32(q, batch, heads, d_qk, d_v), _float32(q, batch, heads, d_qk)) if want_initial else (None, None)
    _states(
        launch, constants.updates if dot is None else constants.updates_given, constants.scan, config,
        (q_at, g_at, wq, rn, side, at(h), at(dot), delta), decay, d_states, d_norms,
        (at(dc_end), at(dn_end)), (at(saved.states), norms), (at(dc0), at(dn0)), passed, (batch, *size, d_qk, d_v), (*by_q, *by_g),
    )  # fmt: skip
    launch(
        cell.pair_gradients, (blocks * (blocks + 1) // 2, chunks, bh),
        (
            q_at, k_at, v_at, g_at, row, col, rn, delta, start_at, p, ds, row_sum, col_sum, diagonal,
            *size, *by_q, *by_k, *by_v, *by_g, d_qk**-0.5,
        ),
        constants.pairs,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    tile = config.gradients.sizes
    launch(
        cell.combine_gradients, (chunks * lc // tile["BM"] * (2 + d_v // tile["BN"]), bh, 1),
        (
            q_at, k_at, v_at, g_at, p, ds, at(saved.states), norms, d_states, d_norms, wq, rn, delta, wk,
            row, col, start_at, at(dq), at(dk), at(dv), rq, rk, *size, *by_q, *by_k, *by_v, *by_g, d_qk**-0.5,
        ),
        constants.gradients,
    )  # fmt: skip
    di, df = _float32(q, batch, length, heads), _float32(q, batch, length, heads)
    launch(
        gates.gate_gradients, (chunks, bh, 1),
        (
            i_at, f_at, start_at, row_sum, col_sum, diagonal, rq, rk, passed, at(di), at(df),
            *size, tiles, *igate.stride(), *fgate.stride(), gate_cap,
        ),
        constants.gate_gradients,
    )  # fmt: skip
    launch.finish()
    return dq, dk, dv, di, df, dc0, dn0


def norm_gate_forward(h: Tensor, ogate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y (B, T, H, V) in the gate's dtype and layout. ogate (B, T, H, V), any strides but the last; weight (H * V)."""
    batch, length, heads, d_v = h.shape
    ogate = rows(ogate)
    y = torch.empty_like(ogate)
    total = batch * length * heads
    launch = Launches(("norm", d_v), (h, ogate, weight, y))
    block = max(2, 512 // d_v)
    launch(
        norm.norm_gate, (-(-total // block), 1, 1),
        (*map(launch.pointer, (h, ogate, weight, y)), total, length, heads, *ogate.stride()[:3], *y.stride()[:3], eps),
        {"V": d_v, "BR": block, "num_warps": 2},
    )  # fmt: skip
    launch.finish()
    return y


def norm_gate_backward(dy: Tensor, h: Tensor, ogate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh, dogate (B, T, H, V), dweight (H * V), and <dh, h> (B, T, H)."""
    batch, length, heads, d_v = h.shape
    dy, ogate = rows(dy), rows(ogate)
    dh, dogate, dot = torch.empty_like(h), torch.empty_like(ogate), _float32(h, *h.shape[:3])
    block = 1024 // d_v  # rows at a time: with more a thread has no registers left
    programs = max(1, min((2048 if d_v == 512 else 1024) // heads, -(-batch * length // block)))
    partial = _float32(h, programs, heads * d_v)
    launch = Launches(("norm backward", d_v, block), (dy, h, ogate, weight, dogate))
    launch(
        norm.norm_gate_gradients, (programs, heads, 1),
        (
            *map(launch.pointer, (dy, h, ogate, weight, dh, dogate, dot, partial)),
            batch * length, length, heads, *dy.stride()[:3], *ogate.stride()[:3], *dogate.stride()[:3], eps,
        ),
        {"V": d_v, "BR": block, "num_warps": 2},
    )  # fmt: skip
    launch.finish()
    return dh, dogate, partial.sum(0).to(weight.dtype), dot


def step(q, k, v, igate, fgate, c, n, m, gate_cap: float, eps: float) -> Tensor:
    """h (B, H, V) of one token; the contiguous c, n, m are overwritten. q, k (B, H, K), v (B, H, V), gates (B, H)."""
    batch, heads, d_qk = q.shape
    d_v = v.shape[-1]
    q, k, v = rows(q), rows(k), rows(v)
    h = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_v = min(d_v, 32)
    launch = Launches(("step", d_qk, d_v), (q, k, v, igate, fgate, c, n, m))
    q_at, k_at, v_at, i_at, f_at, c_at, n_at, m_at, h_at = map(launch.pointer, (q, k, v, igate, fgate, c, n, m, h))
    by_k, by_gates = k.stride()[:2], (*igate.stride(), *fgate.stride())
    launch(
        decode_step, (d_v // block_v, batch * heads, 1),
        (
            q_at, k_at, v_at, i_at, f_at, c_at, n_at, m_at, h_at,
            heads, *q.stride()[:2], *by_k, *v.stride()[:2], *by_gates, d_qk**-0.5, gate_cap, eps,
        ),
        {"K": d_qk, "V": d_v, "BK": min(d_qk, 64), "BV": block_v, "num_warps": 4},
    )  # fmt: skip
    launch(
        decode_normaliser, (batch * heads, 1, 1), (k_at, i_at, f_at, n_at, m_at, heads, *by_k, *by_gates, gate_cap),
        {"K": d_qk, "num_warps": 2},
    )  # fmt: skip
    launch.finish()
    return h
