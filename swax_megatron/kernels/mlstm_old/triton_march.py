"""One kernel for every chunk's state: a program keeps its tile of the state in registers and marches along the chunks.

Does what `chunk_updates` and then `scan_states` do, without writing and reading back the chunks' own contributions. Needs enough
tiles (heads times K / BK times V / BV) to fill the GPU, since nothing is parallel over time.

Legend as in `triton_cell.py`: bh batch and head, c chunk of LC tokens, K = d_qk, V = d_v.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "H", "C"])
def march_states(
    x_ptr, y_ptr, w_ptr, wn_ptr, decay_ptr, states_ptr, norms_ptr, c0_ptr, n0_ptr, other_c_ptr, other_n_ptr,
    c_end_ptr, n_end_ptr, passed_ptr, T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr, REVERSE: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Write the state before every chunk: S <- decay S + (w X)' Y, from the start or (REVERSE) from the end.

    REVERSE also sums gradient times state (other) as it passes through each chunk. The last K / BK programs of a head do the normaliser.
    No `if` inside the loops: what happens once a chunk is masked.
    """
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TV: tl.constexpr = V // BV
    TILES: tl.constexpr = K // BK * TV
    ALL: tl.constexpr = TILES + K // BK
    PARTS: tl.constexpr = LC // BT
    lane, dk, dv = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    k0 = tl.where(tile < TILES, tile // TV, tile - TILES) * BK
    x_ptr += (bh // H) * stride_xb + (bh % H) * stride_xh + k0
    decay_ptr += bh * C
    if REVERSE:
        passed_ptr += bh * C * ALL + tile
    zero = bh * 0
    if tile < TILES:
        v0 = (tile % TV) * BV
        y_ptr += (bh // H) * stride_yb + (bh % H) * stride_yh + v0
        w_ptr += bh * C * LC
        inside = (k0 + dk)[:, None] * V + (v0 + dv)[None, :]
        states_ptr += bh * C * K * V
        other_c_ptr += bh * C * K * V
        state = tl.zeros([BK, BV], tl.float32)
        if START:
            state = tl.load(c0_ptr + bh * K * V + inside).to(tl.float32)
        if REVERSE:
            other = tl.load(other_c_ptr + (zero + C - 1) * K * V + inside)
        for j in range(0, C * PARTS):
            part = j % PARTS
            c = zero + j // PARTS
            if REVERSE:
                c = C - 1 - c
            first = part == 0
            decay = tl.where(first, tl.load(decay_ptr + c), 1.0)
            t = c * LC + part * BT + lane
            real = t < T
            x = tl.load(x_ptr + dk[:, None] + t[None, :] * stride_xt, mask=real[None, :], other=0.0)
            y = tl.load(y_ptr + t[:, None] * stride_yt + dv[None, :], mask=real[:, None], other=0.0)
            w = tl.load(w_ptr + t)
            tl.store(states_ptr + c * K * V + inside, state.to(DT), mask=first)
            if REVERSE:
                tl.store(passed_ptr + c * ALL, tl.sum(state * other.to(tl.float32)) * decay, mask=first)
                due = (part == PARTS - 1) & (c > 0)
                other = tl.load(other_c_ptr + tl.maximum(c - 1, 0) * K * V + inside, mask=due, other=0.0)
            state = tl.dot((x.to(tl.float32) * w[None, :]).to(DT), y.to(DT), state * decay, input_precision="ieee")
        if END:
            tl.store(c_end_ptr + bh * K * V + inside, state)
    else:
        wn_ptr += bh * C * LC
        every = bh * C * K + k0 + dk
        norm = tl.zeros([BK], tl.float32)
        if START:
            norm = tl.load(n0_ptr + bh * K + k0 + dk).to(tl.float32)
        for i in tl.range(0, C * PARTS, num_stages=3):
            part = i % PARTS
            c = zero + i // PARTS
            if REVERSE:
                c = C - 1 - c
            first = part == 0
            decay = tl.where(first, tl.load(decay_ptr + c), 1.0)
            t = c * LC + part * BT + lane
            x = tl.load(x_ptr + t[:, None] * stride_xt + dk[None, :], mask=(t < T)[:, None], other=0.0)
            wn = tl.load(wn_ptr + t)
            tl.store(norms_ptr + every + c * K, norm, mask=first)
            if REVERSE:
                tl.store(passed_ptr + c * ALL, tl.sum(norm * tl.load(other_n_ptr + every + c * K)) * decay, mask=first)
            norm = norm * decay + tl.sum(x.to(tl.float32) * wn[:, None], 0)
        if END:
            tl.store(n_end_ptr + bh * K + k0 + dk, norm)
