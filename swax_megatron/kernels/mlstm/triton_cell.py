"""Triton kernels for the matrix work of the chunkwise mLSTM, forward and backward.

Legend: bh batch and head, flattened; t query time, s key time, c chunk of LC tokens; K = d_qk, V = d_v.
q, k, v, h and their gradients are read and written where they lie, (B, T, H, D) with any strides but the last (1).
Saved states lie as (B*H, C, K, V) in the type of the products, normalisers (B*H, C, K) in float32.
The weights (row, col, wq, wk, decay) are those of `triton_gates.py`; every accumulator is float32.

Forward:  `chunk_states` marches over the chunks and leaves the state before each; `chunk_outputs` forms every block of h.
Backward: `row_terms` (delta, 1/n), `chunk_states` marching back, `pair_gradients` (each pair of a chunk once: the matrices
P/n and dS, and the sums the gates need, from unrounded values), then `combine` three times: dq, dk, dv are each
    rowscale * (X @ state + bias * n) + pairs @ Y.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "H", "C"])
def chunk_states(
    x_ptr, y_ptr, w_ptr, wn_ptr, decay_ptr, c0_ptr, n0_ptr, other_c_ptr, other_n_ptr,
    states_ptr, norms_ptr, c_end_ptr, n_end_ptr, passed_ptr,
    T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr, REVERSE: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """S <- decay S + (w X)' Y from chunk to chunk; each chunk's S is stored before its own update. One program per tile of S.

    Forward (X, Y) = (k, v) gives the states; REVERSE (X, Y) = (q, dh) gives their gradients, and as well the sum of
    gradient times state that passes through each chunk (other_c, other_n: the saved states).
    """
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TV: tl.constexpr = V // BV
    TILES: tl.constexpr = (K // BK) * TV
    k0, v0 = (tile // TV) * BK, (tile % TV) * BV
    dk, dv, lane = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    x_ptr += (bh // H) * stride_xb + (bh % H) * stride_xh + k0
    y_ptr += (bh // H) * stride_yb + (bh % H) * stride_yh + v0
    state_at = (k0 + dk)[:, None] * V + (v0 + dv)[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    norm = tl.zeros([BK], tl.float32)
    if START:
        state = tl.load(c0_ptr + bh * K * V + state_at).to(tl.float32)
        norm = tl.load(n0_ptr + bh * K + k0 + dk).to(tl.float32)
    for step in range(0, C):
        c = step
        if REVERSE:
            c = C - 1 - step
        chunk = bh * C + c
        tl.store(states_ptr + chunk * K * V + state_at, state.to(DT))
        if v0 == 0:
            tl.store(norms_ptr + chunk * K + k0 + dk, norm)
        decay = tl.load(decay_ptr + chunk)
        if REVERSE:
            passed = tl.sum(tl.sum(state * tl.load(other_c_ptr + chunk * K * V + state_at).to(tl.float32), 1), 0)
            if v0 == 0:
                passed += tl.sum(norm * tl.load(other_n_ptr + chunk * K + k0 + dk), 0)
            tl.store(passed_ptr + chunk * TILES + tile, passed * decay)
        state = state * decay
        norm = norm * decay
        for part in tl.static_range(LC // BT):
            t = c.to(tl.int64) * LC + part * BT
            real = lane < T - t
            w = tl.load(w_ptr + bh * C * LC + t + lane)
            x = tl.load(x_ptr + t * stride_xt + dk[:, None] + lane[None, :] * stride_xt, mask=real[None, :], other=0.0)
            y = tl.load(y_ptr + t * stride_yt + lane[:, None] * stride_yt + dv[None, :], mask=real[:, None], other=0.0)
            state = tl.dot((x.to(tl.float32) * w[None, :]).to(DT), y.to(DT), state, input_precision="ieee")
            if v0 == 0:
                wn = tl.load(wn_ptr + bh * C * LC + t + lane)
                norm += tl.sum(x.to(tl.float32) * wn[None, :], 1)
    if END:
        tl.store(c_end_ptr + bh * K * V + state_at, state)
        if v0 == 0:
            tl.store(n_end_ptr + bh * K + k0 + dk, norm)


@triton.jit(do_not_specialize=["T", "H", "C"])
def chunk_outputs(
    q_ptr, k_ptr, v_ptr, row_ptr, col_ptr, mt_ptr, wq_ptr, states_ptr, norms_ptr, start_ptr, h_ptr, den_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, eps,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """h for BT tokens and BV of its features: the incoming state's share, then the pairs inside the chunk."""
    pid, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TV: tl.constexpr = V // BV
    batch, head = bh // H, bh % H
    v0 = (pid % TV) * BV
    t0 = (pid // TV).to(tl.int64) * BT
    c = t0 // LC
    rows, cols, dv, dd, dk = tl.arange(0, BT), tl.arange(0, BS), tl.arange(0, BV), tl.arange(0, BD), tl.arange(0, K)
    real = rows < T - t0
    at = bh * C * LC + t0 + rows
    row, wq = tl.load(row_ptr + at), tl.load(wq_ptr + at) * scale
    q_ptr += batch * stride_qb + head * stride_qh + t0 * stride_qt
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh + v0
    states_ptr += (bh * C + c) * K * V + v0
    norms_ptr += (bh * C + c) * K

    acc = tl.zeros([BT, BV], tl.float32)
    den = tl.zeros([BT], tl.float32)
    for d in range(0, K, BD):
        x = tl.load(q_ptr + rows[:, None] * stride_qt + (d + dd)[None, :], mask=real[:, None], other=0.0)
        state = tl.load(states_ptr + (d + dd)[:, None] * V + dv[None, :])
        acc = tl.dot(x.to(DT), state, acc, input_precision="ieee")
        den += tl.sum(x.to(tl.float32) * tl.load(norms_ptr + d + dd)[None, :], 1)
    acc = acc * wq[:, None]
    den = den * wq

    q = tl.load(q_ptr + rows[:, None] * stride_qt + dk[None, :], mask=real[:, None], other=0.0).to(DT)
    if DOCUMENTS:
        start_t = tl.load(start_ptr + batch * T + t0 + rows, mask=real, other=0)
    for s in range(c * LC, t0 + BT, BS):
        seen = cols < T - s
        k = tl.load(k_ptr + s * stride_kt + dk[:, None] + cols[None, :] * stride_kt, mask=seen[None, :], other=0.0)
        col = tl.load(col_ptr + bh * C * LC + s + cols)
        visible = (t0 + rows)[:, None] >= (s + cols)[None, :]
        if DOCUMENTS:
            visible = visible & (start_t[:, None] <= (s + cols)[None, :])
        p = tl.dot(q, k.to(DT), input_precision="ieee") * scale * tl.exp(tl.where(visible, row[:, None] + col[None, :], -1e30))
        den += tl.sum(p, 1)
        v = tl.load(v_ptr + s * stride_vt + cols[:, None] * stride_vt + dv[None, :], mask=seen[:, None], other=0.0)
        acc = tl.dot(p.to(DT), v.to(DT), acc, input_precision="ieee")
    n = tl.maximum(tl.abs(den), tl.exp(-tl.load(mt_ptr + at))) + eps
    h_at = ((batch * T + t0 + rows) * H + head)[:, None] * V + (v0 + dv)[None, :]
    tl.store(h_ptr + h_at, (acc / n[:, None]).to(h_ptr.dtype.element_ty), mask=real[:, None])
    if v0 == 0:
        tl.store(den_ptr + at, den)


@triton.jit(do_not_specialize=["T", "H", "C"])
def row_terms(
    dh_ptr, h_ptr, dot_ptr, den_ptr, mt_ptr, wq_ptr, rn_ptr, delta_ptr, wd_ptr, wdd_ptr,
    T, H, C, stride_gb, stride_gt, stride_gh, scale, eps,
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
    wd = tl.where(real, tl.load(wq_ptr + at) * rn * scale, 0.0)
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


@triton.jit(do_not_specialize=["T", "H", "C"])
def combine(
    x_ptr, y_ptr, z_ptr, pairs_ptr, states_ptr, norms_ptr, scale_ptr, bias_ptr, out_ptr, sum_ptr,
    T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_zb, stride_zt, stride_zh, stride_sd, stride_sn,
    D: tl.constexpr, N: tl.constexpr, LC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    KEYS: tl.constexpr, SUMS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """out = rowscale * X @ state + bias * n + pairs @ Y, for BM tokens and BN of N features; X has D features.

    The state is read through (stride_sd, stride_sn), so that either side of it can be contracted. KEYS: the rows are keys, the
    pair matrix is read transposed and its later queries are gathered. SUMS: also <Z, the state's share> per row (and the bias).
    """
    pid, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TN: tl.constexpr = N // BN
    batch, head = bh // H, bh % H
    n0 = (pid % TN) * BN
    t0 = (pid // TN).to(tl.int64) * BM
    c = t0 // LC
    inner = (t0 - c * LC).to(tl.int32)
    rows, cols, dn, dd = tl.arange(0, BM), tl.arange(0, BS), tl.arange(0, BN), tl.arange(0, BD)
    real = rows < T - t0
    at = bh * C * LC + t0 + rows
    x_ptr += batch * stride_xb + head * stride_xh + t0 * stride_xt
    y_ptr += batch * stride_yb + head * stride_yh + c * LC * stride_yt + n0
    states_ptr += (bh * C + c) * D * N + n0 * stride_sn

    acc = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BD):
        x = tl.load(x_ptr + rows[:, None] * stride_xt + (d + dd)[None, :], mask=real[:, None], other=0.0)
        state = tl.load(states_ptr + (d + dd)[:, None] * stride_sd + dn[None, :] * stride_sn)
        acc = tl.dot(x.to(DT), state, acc, input_precision="ieee")
    acc = acc * tl.load(scale_ptr + at)[:, None]
    if SUMS:
        acc += tl.load(bias_ptr + at)[:, None] * tl.load(norms_ptr + (bh * C + c) * N + n0 + dn)[None, :]
        z_at = batch * stride_zb + head * stride_zh + (t0 + rows)[:, None] * stride_zt + (n0 + dn)[None, :]
        z = tl.load(z_ptr + z_at, mask=real[:, None], other=0.0).to(tl.float32)
        tl.store(sum_ptr + at, tl.sum(acc * z, 1))

    pairs_ptr += (bh * C + c) * LC * LC
    left = (T - c * LC).to(tl.int32)
    if KEYS:
        for s in range(inner, LC, BS):
            pair = tl.load(pairs_ptr + (inner + rows)[:, None] + (s + cols)[None, :] * LC)
            y = tl.load(y_ptr + (s + cols)[:, None] * stride_yt + dn[None, :], mask=(s + cols < left)[:, None], other=0.0)
            acc = tl.dot(pair, y.to(DT), acc, input_precision="ieee")
    else:
        for s in range(0, inner + BM, BS):
            pair = tl.load(pairs_ptr + (inner + rows)[:, None] * LC + (s + cols)[None, :])
            y = tl.load(y_ptr + (s + cols)[:, None] * stride_yt + dn[None, :], mask=(s + cols < left)[:, None], other=0.0)
            acc = tl.dot(pair, y.to(DT), acc, input_precision="ieee")
    out_at = ((batch * T + t0 + rows) * H + head)[:, None] * N + (n0 + dn)[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
