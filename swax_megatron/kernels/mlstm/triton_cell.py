"""Triton kernels for what the chunkwise mLSTM reads from states and from pairs of tokens, forward and backward.

Legend: bh batch and head, flattened; t query time, s key time, c chunk of LC tokens; K = d_qk, V = d_v.
q, k, v, h and their gradients are read and written where they lie, (B, T, H, D) with any strides but the last (1).
States lie as (B*H, C, K, V) in the type of the products, normalisers (B*H, C, K) in float32, pair matrices (B*H, C, LC, LC).
The weights (row, col, wq, wk, decay) are those of `triton_gates.py`; every accumulator is float32.

Forward:  the states (`triton_states.py`), `pair_scores` (P, for wide heads), `outputs` (h, 1/n).
Backward: the gradients of the states and delta, `pair_gradients` (P/n and dS, and the sums the gates need, from unrounded values),
          `combine_gradients` (dq, dk and dv).
h, dq, dk and dv are all rowscale * (X @ state + bias * n) + pairs @ Y. All tiles of a chunk are neighbours in the grid, so that what
they share is read from memory once.
"""

import triton
import triton.language as tl

from ..dependent import join, release, wait


@triton.jit
def _block(pair, BLOCKS: tl.constexpr):
    """Row and column of block `pair` of those on and under the diagonal: (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    ti = 0
    for i in tl.static_range(1, BLOCKS):
        ti += (pair >= i * (i + 1) // 2).to(tl.int32)
    return ti, pair - ti * (ti + 1) // 2


@triton.jit
def _store_block(pairs_ptr, block, ti, si, LC: tl.constexpr, BT: tl.constexpr):
    """One block of a chunk's pair matrix. Products read squares of two blocks of 64 on the diagonal whole: zeros above it."""
    lane = tl.arange(0, BT)
    tl.store(pairs_ptr + (ti * BT + lane)[:, None] * LC + (si * BT + lane)[None, :], block)
    if BT < 128:
        if (si == ti - 1) & (ti % 2 == 1):
            above = pairs_ptr + (si * BT + lane)[:, None] * LC + (ti * BT + lane)[None, :]
            tl.store(above, tl.zeros([BT, BT], block.dtype))


@triton.jit(do_not_specialize=["T", "H", "C"])
def pair_scores(
    q_ptr, k_ptr, row_ptr, col_ptr, wq_ptr, norms_ptr, start_ptr, p_ptr, den_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, scale,
    K: tl.constexpr, LC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One BT x BT block of P, and its share of the denominator (the incoming state's goes with the first key block)."""
    release(PDL)
    pair, c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    BLOCKS: tl.constexpr = LC // BT
    ti, si = _block(pair, BLOCKS)
    batch, head = bh // H, bh % H
    lane, dd = tl.arange(0, BT), tl.arange(0, BD)
    t0, s0 = c * LC + ti * BT, c * LC + si * BT
    t_real, s_real = lane < T - t0, lane < T - s0
    q_ptr += batch * stride_qb + head * stride_qh + t0 * stride_qt
    k_ptr += batch * stride_kb + head * stride_kh + s0 * stride_kt
    scores = tl.zeros([BT, BT], tl.float32)
    for d in range(0, K, BD):
        q = tl.load(q_ptr + lane[:, None] * stride_qt + (d + dd)[None, :], mask=t_real[:, None], other=0.0)
        k = tl.load(k_ptr + lane[None, :] * stride_kt + (d + dd)[:, None], mask=s_real[None, :], other=0.0)
        scores = tl.dot(q.to(DT), k.to(DT), scores, input_precision="ieee")
    # waits here, for the scan's normalisers: nothing is written before, and q and k are older than the scan, which has called `join`
    wait(PDL)
    read = tl.zeros([BT], tl.float32)
    if si == 0:
        for d in range(0, K, BD):
            q = tl.load(q_ptr + lane[:, None] * stride_qt + (d + dd)[None, :], mask=t_real[:, None], other=0.0)
            read += tl.sum(q.to(tl.float32) * tl.load(norms_ptr + (bh * C + c) * K + d + dd)[None, :], 1)
    base, t, s = bh * C * LC, t0 + lane, s0 + lane
    visible = t[:, None] >= s[None, :]
    if DOCUMENTS:
        visible = visible & (tl.load(start_ptr + batch * T + t, mask=t_real, other=0)[:, None] <= s[None, :])
    logs = tl.where(visible, tl.load(row_ptr + base + t)[:, None] + tl.load(col_ptr + base + s)[None, :], -1e30)
    p = scores * scale * tl.exp(logs)
    _store_block(p_ptr + (bh * C + c) * LC * LC, p.to(DT), ti, si, LC, BT)
    tl.store(den_ptr + (bh * BLOCKS + si) * C * LC + t, tl.sum(p, 1) + read * tl.load(wq_ptr + base + t))


@triton.jit(do_not_specialize=["T", "H", "C"])
def outputs(
    q_ptr, k_ptr, v_ptr, p_ptr, den_ptr, states_ptr, norms_ptr, row_ptr, col_ptr, mt_ptr, wq_ptr, start_ptr, h_ptr, rn_ptr, side_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, eps,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    BLOCKS: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h for BM tokens and BN features; 1/n, and the sign of the denominator where it is what n is (else 0: n is its floor).

    BLOCKS: into how many `pair_scores` has divided a chunk's rows, or 0: P is computed here.
    """
    pid, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    join(PDL)
    TN: tl.constexpr = V // BN
    t0, n0 = (pid // TN).to(tl.int64) * BM, (pid % TN) * BN
    batch, head, c = bh // H, bh % H, t0 // LC
    inner = (t0 - c * LC).to(tl.int32)
    rows, cols, dn, dd, dk = tl.arange(0, BM), tl.arange(0, BS), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, K)
    real = rows < T - t0
    left = (T - c * LC).to(tl.int32)
    at = bh * C * LC + t0 + rows
    q_ptr += batch * stride_qb + head * stride_qh + t0 * stride_qt
    k_ptr += batch * stride_kb + head * stride_kh + c * LC * stride_kt
    v_ptr += batch * stride_vb + head * stride_vh + c * LC * stride_vt + n0
    states_ptr += (bh * C + c) * K * V + n0
    norms_ptr += (bh * C + c) * K

    wq = tl.load(wq_ptr + at)
    if BLOCKS == 0:
        all_q = tl.load(q_ptr + rows[:, None] * stride_qt + dk[None, :], mask=real[:, None], other=0.0)
        den = tl.sum(all_q.to(tl.float32) * tl.load(norms_ptr + dk)[None, :], 1) * wq
    acc = tl.zeros([BM, BN], tl.float32)
    for d in range(0, K, BD):
        q = tl.load(q_ptr + rows[:, None] * stride_qt + (d + dd)[None, :], mask=real[:, None], other=0.0)
        state = tl.load(states_ptr + (d + dd)[:, None] * V + dn[None, :])
        acc = tl.dot(q.to(DT), state, acc, input_precision="ieee")
    acc *= wq[:, None]

    if BLOCKS == 0:
        row, all_q = tl.load(row_ptr + at), all_q.to(DT)
        if DOCUMENTS:
            start = tl.load(start_ptr + batch * T + t0 + rows, mask=real, other=0) - (c * LC).to(tl.int32)
    else:
        p_ptr += (bh * C + c) * LC * LC + (inner + rows)[:, None] * LC
        den = tl.zeros([BM], tl.float32)
        for j in tl.static_range(BLOCKS):  # a share of every block of keys up to the row's own
            part = den_ptr + (bh * BLOCKS + j) * C * LC + t0 + rows
            den += tl.load(part, mask=(inner + rows) // (LC // BLOCKS) >= j, other=0.0)
    for s0 in range(0, inner + BM, BS):
        s = s0 + cols
        if BLOCKS == 0:
            k = tl.load(k_ptr + s[None, :] * stride_kt + dk[:, None], mask=(s < left)[None, :], other=0.0)
            scores = tl.dot(all_q, k.to(DT), input_precision="ieee")
            visible = (inner + rows)[:, None] >= s[None, :]
            if DOCUMENTS:
                visible = visible & (start[:, None] <= s[None, :])
            col = tl.load(col_ptr + bh * C * LC + c * LC + s)
            p = scores * tl.exp(tl.where(visible, row[:, None] + col[None, :], -1e30)) * scale
            den += tl.sum(p, 1)
            p = p.to(DT)
        else:
            p = tl.load(p_ptr + s[None, :])
        v = tl.load(v_ptr + s[:, None] * stride_vt + dn[None, :], mask=(s < left)[:, None], other=0.0)
        acc = tl.dot(p, v.to(DT), acc, input_precision="ieee")

    floor = tl.exp(-tl.load(mt_ptr + at))
    rn = 1.0 / (tl.maximum(tl.abs(den), floor) + eps)
    out = ((batch * T + t0 + rows) * H + head)[:, None] * V + (n0 + dn)[None, :]
    tl.store(h_ptr + out, (acc * rn[:, None]).to(h_ptr.dtype.element_ty), mask=real[:, None])
    if n0 == 0:
        side = tl.where(den > 0, 1.0, -1.0)
        tl.store(rn_ptr + at, tl.where(real, rn, 0.0))
        tl.store(side_ptr + at, tl.where(real & (tl.abs(den) > floor), side, 0.0))


@triton.jit(do_not_specialize=["T", "H", "C"])
def pair_gradients(
    q_ptr, k_ptr, v_ptr, dh_ptr, row_ptr, col_ptr, rn_ptr, delta_ptr, start_ptr,
    p_ptr, ds_ptr, row_sum_ptr, col_sum_ptr, diagonal_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh, scale,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One BT x BT block of a chunk's pairs: dS and (KEEP) P/n, stored as products will read them, and the sums of W = dS * S."""
    release(PDL)
    pair, c, bh = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    BLOCKS: tl.constexpr = LC // BT
    ti, si = _block(pair, BLOCKS)
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

    base, t, s = bh * C * LC, t0 + lane, s0 + lane
    # past the first-level cache, because the wait comes later: what kernels before the scan wrote is in the second
    row, rn = tl.load(row_ptr + base + t, cache_modifier=".cg"), tl.load(rn_ptr + base + t, cache_modifier=".cg")
    delta, col = tl.load(delta_ptr + base + t, cache_modifier=".cg"), tl.load(col_ptr + base + s, cache_modifier=".cg")
    visible = (t[:, None] >= s[None, :]) & t_real[:, None]
    if DOCUMENTS:
        start_t = tl.load(start_ptr + batch * T + t, mask=t_real, other=0, cache_modifier=".cg")
        visible = visible & (start_t[:, None] <= s[None, :])
    weight = tl.exp(tl.where(visible, row[:, None] + col[None, :], -1e30)) * (rn * scale)[:, None]
    ds = (dp + delta[:, None]) * weight
    chunk = (bh * C + c) * LC * LC
    if KEEP:
        _store_block(p_ptr + chunk, (scores * weight).to(DT), ti, si, LC, BT)
    _store_block(ds_ptr + chunk, ds.to(DT), ti, si, LC, BT)
    w = ds * scores
    strict = tl.where(t[:, None] > s[None, :], w, 0.0)
    tl.store(row_sum_ptr + (bh * BLOCKS + si) * C * LC + t, tl.sum(strict, 1))
    tl.store(col_sum_ptr + (bh * BLOCKS + ti) * C * LC + s, tl.sum(strict, 0))
    if ti == si:
        tl.store(diagonal_ptr + base + t, tl.sum(tl.where(t[:, None] == s[None, :], w, 0.0), 1))
    # waits last: neither the scan, which comes before, nor this kernel writes what the other reads or writes; what is read above is older
    # than the scan, which has called `join`
    wait(PDL)


@triton.jit
def _combine(
    block, bh, n0, x_ptr, y_ptr, z_ptr, pairs_ptr, states_ptr, norms_ptr, weight, bias, sum_ptr,
    T, H, C, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_zb, stride_zt, stride_zh,
    D: tl.constexpr, N: tl.constexpr, LC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    BY_VALUE: tl.constexpr, KEYS: tl.constexpr, SUMS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """weight * (X @ state) + bias * n + pairs @ Y for BM tokens and BN of N features; X has D features.

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
    acc = acc * weight[:, None]
    if SUMS:
        acc += bias[:, None] * tl.load(norms_ptr + (bh * C + c) * N + n0 + dn)[None, :]
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
def _value_gradients(
    block, bh, n0, q_ptr, k_ptr, dh_ptr, d_states_ptr, row_ptr, col_ptr, rn_ptr, wk_ptr, start_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh, scale,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dv of BM keys and BN features: wk * (k @ dC) + (P / n)' dh, P computed here."""
    batch, head = bh // H, bh % H
    s0 = block.to(tl.int64) * BM
    c = s0 // LC
    inner = (s0 - c * LC).to(tl.int32)
    rows, cols, dn, dd, dk = tl.arange(0, BM), tl.arange(0, BS), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, K)
    real = rows < T - s0
    left = (T - c * LC).to(tl.int32)
    base = bh * C * LC + c * LC
    k_ptr += batch * stride_kb + head * stride_kh + s0 * stride_kt
    q_ptr += batch * stride_qb + head * stride_qh + c * LC * stride_qt
    dh_ptr += batch * stride_gb + head * stride_gh + c * LC * stride_gt + n0
    d_states_ptr += (bh * C + c) * K * V + n0
    acc = tl.zeros([BM, BN], tl.float32)
    for d in range(0, K, BD):
        k = tl.load(k_ptr + rows[:, None] * stride_kt + (d + dd)[None, :], mask=real[:, None], other=0.0)
        state = tl.load(d_states_ptr + (d + dd)[:, None] * V + dn[None, :])
        acc = tl.dot(k.to(DT), state, acc, input_precision="ieee")
    acc = acc * tl.load(wk_ptr + base + inner + rows)[:, None]
    col = tl.load(col_ptr + base + inner + rows)
    k = tl.load(k_ptr + rows[:, None] * stride_kt + dk[None, :], mask=real[:, None], other=0.0).to(DT)
    for t0 in range(inner, LC, BS):
        t = t0 + cols
        q = tl.load(q_ptr + t[None, :] * stride_qt + dk[:, None], mask=(t < left)[None, :], other=0.0)
        scores = tl.dot(k, q.to(DT), input_precision="ieee")
        visible = ((inner + rows)[:, None] <= t[None, :]) & (t < left)[None, :]
        if DOCUMENTS:
            start = tl.load(start_ptr + batch * T + c * LC + t, mask=t < left, other=0) - (c * LC).to(tl.int32)
            visible = visible & (start[None, :] <= (inner + rows)[:, None])
        row, rn = tl.load(row_ptr + base + t), tl.load(rn_ptr + base + t)
        p = scores * tl.exp(tl.where(visible, col[:, None] + row[None, :], -1e30)) * (rn * scale)[None, :]
        g = tl.load(dh_ptr + t[:, None] * stride_gt + dn[None, :], mask=(t < left)[:, None], other=0.0)
        acc = tl.dot(p.to(DT), g.to(DT), acc, input_precision="ieee")
    return acc


@triton.jit
def _store(out_ptr, acc, block, bh, n0, T, H, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows of (B, T, H, N)."""
    t = block.to(tl.int64) * BM + tl.arange(0, BM)
    at = (((bh // H) * T + t) * H + bh % H)[:, None] * N + (n0 + tl.arange(0, BN))[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["T", "H", "C"])
def combine_gradients(
    q_ptr, k_ptr, v_ptr, dh_ptr, p_ptr, ds_ptr, states_ptr, norms_ptr, d_states_ptr, d_norms_ptr, wq_ptr, rn_ptr, delta_ptr, wk_ptr,
    row_ptr, col_ptr, start_ptr, dq_ptr, dk_ptr, dv_ptr, rq_ptr, rk_ptr,
    T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh, scale,
    K: tl.constexpr, V: tl.constexpr, LC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of dq, dk (all K features, with the gates' row sums) or dv (BN of V features) for BM tokens."""
    pid, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    join(PDL)
    TASKS: tl.constexpr = 2 + V // BN
    block, task = pid // TASKS, pid % TASKS
    zero = task * 0
    at = bh * C * LC + block.to(tl.int64) * BM + tl.arange(0, BM)
    if task == 0:
        weight = tl.load(wq_ptr + at) * tl.load(rn_ptr + at)
        dq = _combine(
            block, bh, zero, dh_ptr, k_ptr, q_ptr, ds_ptr, states_ptr, norms_ptr, weight, weight * tl.load(delta_ptr + at), rq_ptr,
            T, H, C, stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh, stride_qb, stride_qt, stride_qh,
            V, K, LC, BM, K, BS, BD, True, False, True, DT,
        )  # fmt: skip
        _store(dq_ptr, dq, block, bh, zero, T, H, K, BM, K)
    elif task == 1:
        weight = tl.load(wk_ptr + at)
        dk = _combine(
            block, bh, zero, v_ptr, q_ptr, k_ptr, ds_ptr, d_states_ptr, d_norms_ptr, weight, weight, rk_ptr,
            T, H, C, stride_vb, stride_vt, stride_vh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
            V, K, LC, BM, K, BS, BD, True, True, True, DT,
        )  # fmt: skip
        _store(dk_ptr, dk, block, bh, zero, T, H, K, BM, K)
    else:
        n0 = (task - 2) * BN
        if KEEP:
            weight = tl.load(wk_ptr + at)
            dv = _combine(
                block, bh, n0, k_ptr, dh_ptr, k_ptr, p_ptr, d_states_ptr, d_norms_ptr, weight, weight, rk_ptr,
                T, H, C, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh, stride_kb, stride_kt, stride_kh,
                K, V, LC, BM, BN, BS, BD, False, True, False, DT,
            )  # fmt: skip
        else:
            dv = _value_gradients(
                block, bh, n0, q_ptr, k_ptr, dh_ptr, d_states_ptr, row_ptr, col_ptr, rn_ptr, wk_ptr, start_ptr,
                T, H, C, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh, scale,
                K, V, LC, BM, BN, BS, BD, DOCUMENTS, DT,
            )  # fmt: skip
        _store(dv_ptr, dv, block, bh, n0, T, H, V, BM, BN)
