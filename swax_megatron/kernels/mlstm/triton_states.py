"""Triton kernels for the state before every chunk of the mLSTM, and for its gradient: each chunk's own contribution, then a scan in place.

Legend as in `triton_cell.py`: bh batch and head, c chunk of LC tokens, K = d_qk, V = d_v. States lie as (B*H, C, K, V) in the type of the
products, normalisers (B*H, C, K) in float32; every accumulator is float32.
"""

import triton
import triton.language as tl

from ..dependent import join


@triton.jit(do_not_specialize=["T", "H", "C"])
def chunk_updates(
    x_ptr, y_ptr, w_ptr, rn_ptr, side_ptr, h_ptr, dot_ptr, delta_ptr, states_ptr, norms_ptr,
    T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
    BACK: tl.constexpr, DOT: tl.constexpr, DT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(w X)' Y and sum(w X) of each of GROUP chunks: (k, v) for the states; BACK: (q, dh), w / n and delta w / n for their gradients.

    A program has one tile of the matrices, in one loop over all tokens, so that loads go on while a chunk's sum is stored. The last
    GROUP programs have the sums of a chunk, and (BACK) delta = -<dh, h> side before, with <dh, h> given (DOT) or not: on Hopper
    (Triton 3.6) a sum in the loop of an asynchronous product has raced.
    """
    join(PDL)
    tile, first, bh = tl.program_id(0), tl.program_id(1).to(tl.int64) * GROUP, tl.program_id(2).to(tl.int64)
    TV: tl.constexpr = V // BV
    TILES: tl.constexpr = K // BK * TV
    PARTS: tl.constexpr = LC // BT
    x_ptr += (bh // H) * stride_xb + (bh % H) * stride_xh
    y_ptr += (bh // H) * stride_yb + (bh % H) * stride_yh
    if tile < TILES:
        k0, v0 = (tile // TV) * BK, (tile % TV) * BV
        dk, dv, lane = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
        x_ptr += first * LC * stride_xt + k0
        y_ptr += first * LC * stride_yt + v0
        to_ptr = states_ptr + (bh * C + first) * K * V + (k0 + dk)[:, None] * V + (v0 + dv)[None, :]
        tokens = (bh * C + first) * LC + lane
        left = (T - first * LC).to(tl.int32)
        update = tl.zeros([BK, BV], tl.float32)
        for i in range(0, tl.minimum(C - first, GROUP).to(tl.int32) * PARTS):
            t = i * BT + lane
            real = t < left
            w = tl.load(w_ptr + tokens + i * BT)
            if BACK:
                w *= tl.load(rn_ptr + tokens + i * BT)
            x = tl.load(x_ptr + dk[:, None] + t[None, :].to(tl.int64) * stride_xt, mask=real[None, :], other=0.0)
            y = tl.load(y_ptr + t[:, None].to(tl.int64) * stride_yt + dv[None, :], mask=real[:, None], other=0.0)
            update = tl.dot((x.to(tl.float32) * w[None, :]).to(DT), y.to(DT), update, input_precision="ieee")
            if i % PARTS == PARTS - 1:
                tl.store(to_ptr, update.to(DT))
                to_ptr += K * V
                update = tl.zeros([BK, BV], tl.float32)
    else:
        c = first + (tile - TILES)
        if c < C:
            every, all_v, rows = tl.arange(0, K), tl.arange(0, V), tl.arange(0, 16)
            norm = tl.zeros([16, K], tl.float32)
            for begin in range(0, LC, 16):
                t = c * LC + begin + rows
                real, at = t < T, bh * C * LC + t
                w = tl.load(w_ptr + at)
                if BACK:
                    token = ((bh // H) * T + t) * H + bh % H
                    if DOT:
                        dot = tl.load(dot_ptr + token, mask=real, other=0.0)
                    else:
                        y = tl.load(y_ptr + t[:, None] * stride_yt + all_v[None, :], mask=real[:, None], other=0.0).to(tl.float32)
                        h = tl.load(h_ptr + token[:, None] * V + all_v[None, :], mask=real[:, None], other=0.0).to(tl.float32)
                        dot = tl.sum(y * h, 1)
                    delta = -dot * tl.load(side_ptr + at)
                    tl.store(delta_ptr + at, delta)
                    w *= tl.load(rn_ptr + at) * delta
                x = tl.load(x_ptr + t[:, None] * stride_xt + every[None, :], mask=real[:, None], other=0.0)
                norm += x.to(tl.float32) * w[:, None]
            tl.store(norms_ptr + (bh * C + c) * K + every, tl.sum(norm, 0))


@triton.jit
def _scan_step(state, update, other, at_ptr, passed_ptr, decay, real, REVERSE: tl.constexpr):
    """Put the state where the update was, then decay it and add the update."""
    tl.store(at_ptr, state.to(update.dtype), mask=real)
    if REVERSE:
        tl.store(passed_ptr, tl.sum(state * other.to(tl.float32), 0) * decay, mask=real)
    return state * decay + update.to(tl.float32)


@triton.jit
def _scan(
    at_ptr, other_ptr, passed_ptr, decay_ptr, state, zero, C,
    SIZE: tl.constexpr, TILES: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Over all chunks, AHEAD (4) at a time so that their loads overlap.

    at_ptr, other_ptr: this tile in chunk 0; SIZE: elements to the next chunk; zero: an int64 0, to count chunks in.
    """
    for begin in range(0, C, AHEAD):
        c0, c1, c2, c3 = zero + begin, zero + begin + 1, zero + begin + 2, zero + begin + 3
        r0, r1, r2, r3 = c0 < C, c1 < C, c2 < C, c3 < C
        if REVERSE:
            c0, c1, c2, c3 = C - 1 - c0, C - 1 - c1, C - 1 - c2, C - 1 - c3
        p0, p1 = at_ptr + c0 * SIZE, at_ptr + c1 * SIZE
        p2, p3 = at_ptr + c2 * SIZE, at_ptr + c3 * SIZE
        u0, u1 = tl.load(p0, mask=r0, other=0.0), tl.load(p1, mask=r1, other=0.0)
        u2, u3 = tl.load(p2, mask=r2, other=0.0), tl.load(p3, mask=r3, other=0.0)
        d0, d1 = tl.load(decay_ptr + c0, mask=r0, other=1.0), tl.load(decay_ptr + c1, mask=r1, other=1.0)
        d2, d3 = tl.load(decay_ptr + c2, mask=r2, other=1.0), tl.load(decay_ptr + c3, mask=r3, other=1.0)
        o0, o1, o2, o3 = u0, u1, u2, u3
        if REVERSE:
            o0 = tl.load(other_ptr + c0 * SIZE, mask=r0, other=0.0)
            o1 = tl.load(other_ptr + c1 * SIZE, mask=r1, other=0.0)
            o2 = tl.load(other_ptr + c2 * SIZE, mask=r2, other=0.0)
            o3 = tl.load(other_ptr + c3 * SIZE, mask=r3, other=0.0)
        state = _scan_step(state, u0, o0, p0, passed_ptr + c0 * TILES, d0, r0, REVERSE)
        state = _scan_step(state, u1, o1, p1, passed_ptr + c1 * TILES, d1, r1, REVERSE)
        state = _scan_step(state, u2, o2, p2, passed_ptr + c2 * TILES, d2, r2, REVERSE)
        state = _scan_step(state, u3, o3, p3, passed_ptr + c3 * TILES, d3, r3, REVERSE)
    return state


@triton.jit(do_not_specialize=["C"])
def scan_states(
    states_ptr, norms_ptr, decay_ptr, c0_ptr, n0_ptr, other_c_ptr, other_n_ptr, c_end_ptr, n_end_ptr, passed_ptr, C,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr, END: tl.constexpr, REVERSE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Replace each chunk's update by the state before it: S <- decay S + update, from the start or (REVERSE) from the end.

    REVERSE also sums gradient times state (other) as it passes through each chunk. The last program of a head does the normaliser.
    """
    join(PDL)
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TILES: tl.constexpr = K * V // BLOCK + 1
    decay_ptr += bh * C
    if REVERSE:
        passed_ptr += bh * C * TILES + tile
    if tile < TILES - 1:
        at = tile * BLOCK + tl.arange(0, BLOCK)
        state = tl.zeros([BLOCK], tl.float32)
        if START:
            state = tl.load(c0_ptr + bh * K * V + at).to(tl.float32)
        all_at = bh * C * K * V + at
        state = _scan(states_ptr + all_at, other_c_ptr + all_at, passed_ptr, decay_ptr, state, bh * 0, C, K * V, TILES, REVERSE, 4)
        if END:
            tl.store(c_end_ptr + bh * K * V + at, state)
    else:
        dk = tl.arange(0, K)
        norm = tl.zeros([K], tl.float32)
        if START:
            norm = tl.load(n0_ptr + bh * K + dk).to(tl.float32)
        every = bh * C * K + dk
        norm = _scan(norms_ptr + every, other_n_ptr + every, passed_ptr, decay_ptr, norm, bh * 0, C, K, TILES, REVERSE, 4)
        if END:
            tl.store(n_end_ptr + bh * K + dk, norm)
