"""Triton kernels for the matrix work of the chunkwise mLSTM, forward and backward.

Legend: bh batch and head, flattened; t query time, s key time, c chunk of LC tokens; K = d_qk, V = d_v.
q, k, v, h and their gradients are read and written where they lie, (B, T, H, D) with any strides but the last (1).
States lie as (B*H, C, K, V) in the type of the products, normalisers (B*H, C, K) in float32, pair matrices (B*H, C, LC, LC).
The weights (row, col, wq, wk, decay) are those of `triton_gates.py`; every accumulator is float32.

Forward:  `chunk_updates` (each chunk's own contribution), `scan_states` (in place: the state before each chunk),
          `pair_scores` (P), `combine_outputs` (h).
Backward: `row_terms` (delta, 1/n), `chunk_updates` and `scan_states` again for the gradients of the states, `pair_gradients`
          (P/n and dS, and the sums the gates need, from unrounded values), `combine_gradients` (dq, dk and dv).
h, dq, dk and dv are all rowscale * (X @ state + bias * n) + pairs @ Y: one function, `_combine`. All tiles of a chunk are
neighbours in the grid, so that what they share is read from memory once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "H", "C"])
def chunk_updates(
    x_ptr, y_ptr, w_ptr, wn_ptr, states_ptr, norms_ptr,
    T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """(w X)' Y and sum(wn X) of one chunk: (k, v) for the states, (q, dh) for their gradients. One program per tile."""
    tile, c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    TV: tl.constexpr = V // BV
    k0, v0 = (tile // TV) * BK, (tile % TV) * BV
    dk, dv, lane = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    x_ptr += (bh // H) * stride_xb + (bh % H) * stride_xh + c * LC * stride_xt + k0
    y_ptr += (bh // H) * stride_yb + (bh % H) * stride_yh + c * LC * stride_yt + v0
    w_ptr += (bh * C + c) * LC
    wn_ptr += (bh * C + c) * LC
    left = (T - c * LC).to(tl.int32)
    update = tl.zeros([BK, BV], tl.float32)
    norm = tl.zeros([BK], tl.float32)
    for t in range(0, LC, BT):
        real = t + lane < left
        w = tl.load(w_ptr + t + lane)
        x = tl.load(x_ptr + dk[:, None] + (t + lane)[None, :] * stride_xt, mask=real[None, :], other=0.0)
        y = tl.load(y_ptr + (t + lane)[:, None] * stride_yt + dv[None, :], mask=real[:, None], other=0.0)
        update = tl.dot((x.to(tl.float32) * w[None, :]).to(DT), y.to(DT), update, input_precision="ieee")
        if v0 == 0:
            wn = tl.load(wn_ptr + t + lane)
            norm += tl.sum(x.to(tl.float32) * wn[None, :], 1)
    tl.store(states_ptr + (bh * C + c) * K * V + (k0 + dk)[:, None] * V + (v0 + dv)[None, :], update.to(DT))
    if v0 == 0:
        tl.store(norms_ptr + (bh * C + c) * K + k0 + dk, norm)


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
):  # fmt: skip
    """Replace each chunk's update by the state before it: S <- decay S + update, from the start or (REVERSE) from the end.

    REVERSE also sums gradient times state (other) as it passes through each chunk. The last program of a head does the normaliser.
    """
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


@triton.jit(do_not_specialize=["T", "H", "C"])
def pair_scores(
    q_ptr, k_ptr, row_ptr, col_ptr, wq_ptr, norms_ptr, start_ptr, p_ptr, den_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, scale,
    K: tl.constexpr, LC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """One BT x BT block of P, and its share of the denominator (the incoming state's goes with the first key block)."""
    pair, c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    ti, si = (pair > 0).to(tl.int32), (pair > 1).to(tl.int32)  # pairs (0,0), (1,0), (1,1)
    batch, head = bh // H, bh % H
    lane, dd = tl.arange(0, BT), tl.arange(0, BD)
    t0, s0 = c * LC + ti * BT, c * LC + si * BT
    t_real, s_real = lane < T - t0, lane < T - s0
    q_ptr += batch * stride_qb + head * stride_qh + t0 * stride_qt
    k_ptr += batch * stride_kb + head * stride_kh + s0 * stride_kt
    norms_ptr += (bh * C + c) * K
    scores = tl.zeros([BT, BT], tl.float32)
    read = tl.zeros([BT], tl.float32)
    for d in range(0, K, BD):
        q = tl.load(q_ptr + lane[:, None] * stride_qt + (d + dd)[None, :], mask=t_real[:, None], other=0.0)
        k = tl.load(k_ptr + lane[None, :] * stride_kt + (d + dd)[:, None], mask=s_real[None, :], other=0.0)
        scores = tl.dot(q.to(DT), k.to(DT), scores, input_precision="ieee")
    if si == 0:
        for d in range(0, K, BD):  # not in the loop above: there it raced with the asynchronous product (Triton 3.6, Hopper)
            q = tl.load(q_ptr + lane[:, None] * stride_qt + (d + dd)[None, :], mask=t_real[:, None], other=0.0)
            read += tl.sum(q.to(tl.float32) * tl.load(norms_ptr + d + dd)[None, :], 1)
    base = bh * C * LC
    t, s = t0 + lane, s0 + lane
    visible = t[:, None] >= s[None, :]
    if DOCUMENTS:
        visible = visible & (tl.load(start_ptr + batch * T + t, mask=t_real, other=0)[:, None] <= s[None, :])
    logs = tl.where(visible, tl.load(row_ptr + base + t)[:, None] + tl.load(col_ptr + base + s)[None, :], -1e30)
    p = scores * scale * tl.exp(logs)
    inside = (bh * C + c) * LC * LC + (ti * BT + lane)[:, None] * LC + (si * BT + lane)[None, :]
    tl.store(p_ptr + inside, p.to(DT))
    BLOCKS: tl.constexpr = LC // BT
    tl.store(den_ptr + (bh * BLOCKS + si) * C * LC + t, tl.sum(p, 1) + read * tl.load(wq_ptr + base + t))


@triton.jit(do_not_specialize=["T", "H", "C"])
def row_terms(
    dh_ptr, h_ptr, dot_ptr, den_ptr, mt_ptr, wq_ptr, rn_ptr, delta_ptr, wd_ptr, wdd_ptr,
    T, H, C, stride_gb, stride_gt, stride_gh, eps,
    V: tl.constexpr, LC: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Per token: 1/n, delta = -<dh, h> sign(den) where |den| is the denominator, and both times the weight of the state."""
    t0, bh = tl.program_id(0).to(tl.int64) * BT, tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    rows, dv = tl.arange(0, BT), tl.arange(0, V)
    real = rows < T - t0
    token = (batch * T + t0 + rows) * H + head
    if DOT:
        dot = tl.load(dot_ptr + token, mask=real, other=0.0)
    else:
        dh_at = batch * stride_gb + (t0 + rows)[:, None] * stride_gt + head * stride_gh + dv[None, :]
        dh = tl.load(dh_ptr + dh_at, mask=real[:, None], other=0.0).to(tl.float32)
        h = tl.load(h_ptr + token[:, None] * V + dv[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        dot = tl.sum(dh * h, 1)
    at = bh * C * LC + t0 + rows
    den, floor = tl.load(den_ptr + at), tl.exp(-tl.load(mt_ptr + at))
    rn = tl.where(real, 1.0 / (tl.maximum(tl.abs(den), floor) + eps), 0.0)
    delta = tl.where(real & (tl.abs(den) > floor), tl.where(den > 0, -dot, dot), 0.0)
    wd = tl.where(real, tl.load(wq_ptr + at) * rn, 0.0)
    tl.store(rn_ptr + at, rn)
    tl.store(delta_ptr + at, delta)
    tl.store(wd_ptr + at, wd)
    tl.store(wdd_ptr + at, wd * delta)


@triton.jit(do_not_specialize=["T", "H", "C"])
def pair_gradients(
    q_ptr, k_ptr, v_ptr, dh_ptr, row_ptr, col_ptr, rn_ptr, delta_ptr, start_ptr,
    p_ptr, ds_ptr, row_sum_ptr, col_sum_ptr, diagonal_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh, scale,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """One BT x BT block of a chunk's pairs: P/n and dS (stored as products will read them), and the sums of W = dS * S."""
    pair, c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    BLOCKS: tl.constexpr = LC // BT  # 1 or 2: pairs (0,0), (1,0), (1,1)
    ti, si = (pair > 0).to(tl.int32), (pair > 1).to(tl.int32)
    batch, head = bh // H, bh % H
    lane, dd = tl.arange(0, BT), tl.arange(0, BD)
    t0, s0 = c * LC + ti * BT, c * LC + si * BT
    t_real, s_real = lane < T - t0, lane < T - s0
    q_ptr += batch * stride_qb + head * stride_qh + t0 * stride_qt
    g_ptr = dh_ptr + batch * stride_gb + head * stride_gh + t0 * stride_gt
    k_ptr += batch * stride_kb + head * stride_kh + s0 * stride_kt
    v_ptr += batch * stride_vb + head * stride_vh + s0 * stride_vt

    scores = tl.zeros([BT, BT], tl.float32)
    for d in range(0, K, BD):
        q = tl.load(q_ptr + lane[:, None] * stride_qt + (d + dd)[None, :], mask=t_real[:, None], other=0.0)
        k = tl.load(k_ptr + lane[None, :] * stride_kt + (d + dd)[:, None], mask=s_real[None, :], other=0.0)
        scores = tl.dot(q.to(DT), k.to(DT), scores, input_precision="ieee")
    dp = tl.zeros([BT, BT], tl.float32)
    for d in range(0, V, BD):
        g = tl.load(g_ptr + lane[:, None] * stride_gt + (d + dd)[None, :], mask=t_real[:, None], other=0.0)
        v = tl.load(v_ptr + lane[None, :] * stride_vt + (d + dd)[:, None], mask=s_real[None, :], other=0.0)
        dp = tl.dot(g.to(DT), v.to(DT), dp, input_precision="ieee")

    base = bh * C * LC
    row, rn, delta = (tl.load(row_ptr + base + t0 + lane), tl.load(rn_ptr + base + t0 + lane), tl.load(delta_ptr + base + t0 + lane))
    col = tl.load(col_ptr + base + s0 + lane)
    t, s = t0 + lane, s0 + lane
    visible = (t[:, None] >= s[None, :]) & t_real[:, None]
    if DOCUMENTS:
        start_t = tl.load(start_ptr + batch * T + t, mask=t_real, other=0)
        visible = visible & (start_t[:, None] <= s[None, :])
    weight = tl.exp(tl.where(visible, row[:, None] + col[None, :], -1e30)) * (rn * scale)[:, None]
    ds = (dp + delta[:, None]) * weight
    inside = (bh * C + c) * LC * LC + (ti * BT + lane)[:, None] * LC + (si * BT + lane)[None, :]
    tl.store(p_ptr + inside, (scores * weight).to(DT))
    tl.store(ds_ptr + inside, ds.to(DT))
    w = ds * scores
    strict = tl.where(t[:, None] > s[None, :], w, 0.0)
    tl.store(row_sum_ptr + (bh * BLOCKS + si) * C * LC + t, tl.sum(strict, 1))
    tl.store(col_sum_ptr + (bh * BLOCKS + ti) * C * LC + s, tl.sum(strict, 0))
    if ti == si:
        tl.store(diagonal_ptr + base + t, tl.sum(tl.where(t[:, None] == s[None, :], w, 0.0), 1))


@triton.jit
def _combine(
    block, bh, n0, x_ptr, y_ptr, z_ptr, pairs_ptr, states_ptr, norms_ptr, scale_ptr, bias_ptr, sum_ptr,
    T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_zb, stride_zt, stride_zh,
    D: tl.constexpr, N: tl.constexpr, LC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    BY_VALUE: tl.constexpr, KEYS: tl.constexpr, SUMS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """rowscale * (X @ state) + bias * n + pairs @ Y for BM tokens and BN of N features; X has D features.

    BY_VALUE: X meets the state's value side. KEYS: the rows are keys; the pair matrix is read transposed and its later queries are
    gathered. SUMS: with the bias, and <Z, the state's share> of every row goes to sum_ptr.
    """
    batch, head = bh // H, bh % H
    t0 = block.to(tl.int64) * BM
    c = t0 // LC
    inner = (t0 - c * LC).to(tl.int32)
    rows, cols, dn, dd = tl.arange(0, BM), tl.arange(0, BS), tl.arange(0, BN), tl.arange(0, BD)
    real = rows < T - t0
    at = bh * C * LC + t0 + rows
    x_ptr += batch * stride_xb + head * stride_xh + t0 * stride_xt
    y_ptr += batch * stride_yb + head * stride_yh + c * LC * stride_yt + n0
    states_ptr += (bh * C + c) * D * N

    acc = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BD):
        x = tl.load(x_ptr + rows[:, None] * stride_xt + (d + dd)[None, :], mask=real[:, None], other=0.0)
        if BY_VALUE:
            state = tl.load(states_ptr + (d + dd)[:, None] + (n0 + dn)[None, :] * D)
        else:
            state = tl.load(states_ptr + (d + dd)[:, None] * N + (n0 + dn)[None, :])
        acc = tl.dot(x.to(DT), state, acc, input_precision="ieee")
    acc = acc * tl.load(scale_ptr + at)[:, None]
    if SUMS:
        acc += tl.load(bias_ptr + at)[:, None] * tl.load(norms_ptr + (bh * C + c) * N + n0 + dn)[None, :]
        z_at = batch * stride_zb + head * stride_zh + (t0 + rows)[:, None] * stride_zt + (n0 + dn)[None, :]
        z = tl.load(z_ptr + z_at, mask=real[:, None], other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, tl.sum(acc * z, 1))

    pairs_ptr += (bh * C + c) * LC * LC
    left = (T - c * LC).to(tl.int32)
    begin, end = 0, inner + BM
    if KEYS:
        begin, end = inner, LC
    for s in range(begin, end, BS):
        if KEYS:
            pair = tl.load(pairs_ptr + (inner + rows)[:, None] + (s + cols)[None, :] * LC)
        else:
            pair = tl.load(pairs_ptr + (inner + rows)[:, None] * LC + (s + cols)[None, :])
        y = tl.load(y_ptr + (s + cols)[:, None] * stride_yt + dn[None, :], mask=(s + cols < left)[:, None], other=0.0)
        acc = tl.dot(pair, y.to(DT), acc, input_precision="ieee")
    return acc


@triton.jit
def _store(out_ptr, acc, block, bh, n0, T, H, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows of (B, T, H, N)."""
    t = block.to(tl.int64) * BM + tl.arange(0, BM)
    at = (((bh // H) * T + t) * H + bh % H)[:, None] * N + (n0 + tl.arange(0, BN))[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["T", "H", "C"])
def combine_outputs(
    q_ptr, v_ptr, p_ptr, states_ptr, wq_ptr, den_parts_ptr, mt_ptr, h_ptr, den_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_vb, stride_vt, stride_vh, eps,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """h for BM tokens and BN features, and the denominators."""
    pid, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TN: tl.constexpr = V // BN
    block, n0 = pid // TN, (pid % TN) * BN
    acc = _combine(
        block, bh, n0, q_ptr, v_ptr, q_ptr, p_ptr, states_ptr, wq_ptr, wq_ptr, wq_ptr, wq_ptr,
        T, H, C, stride_qb, stride_qt, stride_qh, stride_vb, stride_vt, stride_vh, stride_qb, stride_qt, stride_qh,
        K, V, LC, BM, BN, BS, BD, False, False, False, DT,
    )  # fmt: skip
    t = block.to(tl.int64) * BM + tl.arange(0, BM)
    at = bh * C * LC + t
    den = tl.load(den_parts_ptr + bh * BLOCKS * C * LC + t)
    if BLOCKS == 2:  # rows of the second block have a second share
        den += tl.load(den_parts_ptr + (bh * BLOCKS + 1) * C * LC + t, mask=t % LC >= LC // 2, other=0.0)
    n = tl.maximum(tl.abs(den), tl.exp(-tl.load(mt_ptr + at))) + eps
    _store(h_ptr, acc / n[:, None], block, bh, n0, T, H, V, BM, BN)
    if n0 == 0:
        tl.store(den_ptr + at, den)


@triton.jit(do_not_specialize=["T", "H", "C"])
def combine_gradients(
    q_ptr, k_ptr, v_ptr, dh_ptr, p_ptr, ds_ptr, states_ptr, norms_ptr, d_states_ptr, d_norms_ptr, wd_ptr, wdd_ptr, wk_ptr,
    dq_ptr, dk_ptr, dv_ptr, rq_ptr, rk_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """One tile of dq, dk (all K features, with the gates' row sums) or dv (BN of V features) for BM tokens."""
    pid, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TASKS: tl.constexpr = 2 + V // BN
    block, task = pid // TASKS, pid % TASKS
    zero = task * 0
    if task == 0:
        dq = _combine(
            block, bh, zero, dh_ptr, k_ptr, q_ptr, ds_ptr, states_ptr, norms_ptr, wd_ptr, wdd_ptr, rq_ptr,
            T, H, C, stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh, stride_qb, stride_qt, stride_qh,
            V, K, LC, BM, K, BS, BD, True, False, True, DT,
        )  # fmt: skip
        _store(dq_ptr, dq, block, bh, zero, T, H, K, BM, K)
    elif task == 1:
        dk = _combine(
            block, bh, zero, v_ptr, q_ptr, k_ptr, ds_ptr, d_states_ptr, d_norms_ptr, wk_ptr, wk_ptr, rk_ptr,
            T, H, C, stride_vb, stride_vt, stride_vh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
            V, K, LC, BM, K, BS, BD, True, True, True, DT,
        )  # fmt: skip
        _store(dk_ptr, dk, block, bh, zero, T, H, K, BM, K)
    else:
        n0 = (task - 2) * BN
        dv = _combine(
            block, bh, n0, k_ptr, dh_ptr, k_ptr, p_ptr, d_states_ptr, d_norms_ptr, wk_ptr, wk_ptr, rk_ptr,
            T, H, C, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh,
            K, V, LC, BM, BN, BS, BD, False, True, False, DT,
        )  # fmt: skip
        _store(dv_ptr, dv, block, bh, n0, T, H, V, BM, BN)
