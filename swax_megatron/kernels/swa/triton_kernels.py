"""Triton kernels for causal sliding-window attention with grouped queries: forward, dq, and dk with dv.

Legend: t query time, s key time, h query head, g key/value head, R = query heads per key/value head, D head size.
A query at t sees the keys s with max(start_t, t - window + 1) <= s <= t, start_t the first token of its document.
The window, the sizes and the strides are run-time numbers: one compiled kernel serves every window of its class.

Rows of a tile of queries are (head, time) pairs: PACK heads that share a key/value head, times BM / PACK queries. Packing lets them
share each key block and shortens the slanted edges of the band.

Softmax runs in base 2 (scores times scale * log2 e), online in the forward pass (Dao 2023, "FlashAttention-2"); `lse` keeps
m + log2(sum). dq and dk/dv are separate passes without atomics: gradients are the same bits every time.
SPLIT: blocks whose pairs are all visible skip the mask (three loops; pays where the window is many blocks wide).
"""

import triton
import triton.language as tl


@triton.jit
def _visible(t, s, start_t, window, DOCUMENTS: tl.constexpr):
    """Broadcasting t against s: which pairs attend."""
    seen = (s <= t) & (t - s < window)
    if DOCUMENTS:
        seen = seen & (start_t <= s)
    return seen


@triton.jit
def _attend(
    acc, m, total, q, k_ptr, v_ptr, t, start_t, begin, end, T, window, scale2, stride_kt, stride_vt,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks of [begin, end)."""
    cols, dd = tl.arange(0, BN), tl.arange(0, D)
    for s0 in range(begin, end, BN):
        s = s0 + cols
        k_at = k_ptr + s[None, :].to(tl.int64) * stride_kt + dd[:, None]
        v_at = v_ptr + s[:, None].to(tl.int64) * stride_vt + dd[None, :]
        if MASKED:
            k = tl.load(k_at, mask=s[None, :] < T, other=0.0)
            v = tl.load(v_at, mask=s[:, None] < T, other=0.0)
        else:
            k, v = tl.load(k_at), tl.load(v_at)
        scores = tl.dot(q, k, input_precision="ieee") * scale2
        if MASKED:
            scores = tl.where(_visible(t[:, None], s[None, :], start_t[:, None], window, DOCUMENTS), scores, -1e30)
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
        keep = tl.exp2(m - m_new)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(DT), v, acc * keep[:, None], input_precision="ieee")
        m = m_new
    return acc, m, total


@triton.jit
def _key_range(t0, start_ptr, row, T, window, QUERIES: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr):
    """For queries [t0, t0 + QUERIES): the first key block, the first and the end of the blocks every query sees, the end of all."""
    first, all_from = t0 - window + 1, t0 + QUERIES - window
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(start_ptr + row + t0))
        all_from = tl.maximum(all_from, tl.load(start_ptr + row + tl.minimum(t0 + QUERIES, T) - 1))
    first = tl.maximum(first, 0) // BN * BN
    diagonal = t0 // BN * BN
    all_from = tl.minimum(tl.maximum((tl.maximum(all_from, 0) + BN - 1) // BN * BN, first), diagonal)
    return first, all_from, diagonal, tl.minimum(t0 + QUERIES, T)


@triton.jit(do_not_specialize=["T", "H", "R", "window"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, start_ptr, o_ptr, lse_ptr,
    T, H, R, window, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """o for one tile of queries, and the base-2 logarithm of their softmax sums (B, H, T)."""
    QUERIES: tl.constexpr = BM // PACK
    t0, h0, batch = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64) * PACK, tl.program_id(2).to(tl.int64)
    lane, dd = tl.arange(0, BM), tl.arange(0, D)
    t, h = t0 + lane % QUERIES, h0 + lane // QUERIES
    real = t < T
    q_at = q_ptr + batch * stride_qb + h[:, None] * stride_qh + t[:, None].to(tl.int64) * stride_qt + dd[None, :]
    q = tl.load(q_at, mask=real[:, None], other=0.0)
    k_ptr += batch * stride_kb + (h0 // R) * stride_kh
    v_ptr += batch * stride_vb + (h0 // R) * stride_vh
    start_t = t
    if DOCUMENTS:
        start_t = tl.load(start_ptr + batch * T + t, mask=real, other=0)
    first, all_from, diagonal, end = _key_range(t0, start_ptr, batch * T, T, window, QUERIES, BN, DOCUMENTS)
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], -1e20, tl.float32)  # above the masked scores, so that a block a query does not see adds nothing
    total = tl.zeros([BM], tl.float32)
    if SPLIT:
        acc, m, total = _attend(
            acc, m, total, q, k_ptr, v_ptr, t, start_t, first, all_from, T, window, scale2,
            stride_kt, stride_vt, D, BN, True, DOCUMENTS, DT,
        )  # fmt: skip
        acc, m, total = _attend(
            acc, m, total, q, k_ptr, v_ptr, t, start_t, all_from, diagonal, T, window, scale2,
            stride_kt, stride_vt, D, BN, False, DOCUMENTS, DT,
        )  # fmt: skip
        acc, m, total = _attend(
            acc, m, total, q, k_ptr, v_ptr, t, start_t, diagonal, end, T, window, scale2,
            stride_kt, stride_vt, D, BN, True, DOCUMENTS, DT,
        )  # fmt: skip
    else:
        acc, m, total = _attend(
            acc, m, total, q, k_ptr, v_ptr, t, start_t, first, end, T, window, scale2,
            stride_kt, stride_vt, D, BN, True, DOCUMENTS, DT,
        )  # fmt: skip
    o_at = ((batch * T + t) * H + h)[:, None] * D + dd[None, :]
    tl.store(o_ptr + o_at, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(lse_ptr + (batch * H + h) * T + t, m + tl.log2(total), mask=real)


@triton.jit
def _gather_dq(
    dq, q, do, lse, dot, k_ptr, v_ptr, t, start_t, begin, end, T, window, scale2, stride_kt, stride_vt,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dq += dS K over the key blocks of [begin, end) (without the scale)."""
    cols, dd = tl.arange(0, BN), tl.arange(0, D)
    for s0 in range(begin, end, BN):
        s = s0 + cols
        k_at = k_ptr + s[:, None].to(tl.int64) * stride_kt + dd[None, :]
        v_at = v_ptr + s[None, :].to(tl.int64) * stride_vt + dd[:, None]
        if MASKED:
            k = tl.load(k_at, mask=s[:, None] < T, other=0.0)
            v = tl.load(v_at, mask=s[None, :] < T, other=0.0)
        else:
            k, v = tl.load(k_at), tl.load(v_at)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse[:, None])
        if MASKED:
            p = tl.where(_visible(t[:, None], s[None, :], start_t[:, None], window, DOCUMENTS), p, 0.0)
        ds = p * (tl.dot(do, v, input_precision="ieee") - dot[:, None])
        dq = tl.dot(ds.to(DT), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "H", "R", "window"])
def attention_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, start_ptr, lse_ptr, dot_ptr, dq_ptr,
    T, H, R, window, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, scale, scale2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dq for one tile of queries, and their <do, o>, which `attention_dkv` needs as well: (B, H, T)."""
    QUERIES: tl.constexpr = BM // PACK
    t0, h0, batch = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64) * PACK, tl.program_id(2).to(tl.int64)
    lane, dd = tl.arange(0, BM), tl.arange(0, D)
    t, h = t0 + lane % QUERIES, h0 + lane // QUERIES
    real = t < T
    t_wide = t[:, None].to(tl.int64)
    q = tl.load(q_ptr + batch * stride_qb + h[:, None] * stride_qh + t_wide * stride_qt + dd[None, :], mask=real[:, None], other=0.0)
    do = tl.load(do_ptr + batch * stride_gb + h[:, None] * stride_gh + t_wide * stride_gt + dd[None, :], mask=real[:, None], other=0.0)
    lse = tl.load(lse_ptr + (batch * H + h) * T + t, mask=real, other=0.0)
    out_at = ((batch * T + t) * H + h)[:, None] * D + dd[None, :]
    o = tl.load(o_ptr + out_at, mask=real[:, None], other=0.0)
    dot = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(dot_ptr + (batch * H + h) * T + t, dot, mask=real)
    k_ptr += batch * stride_kb + (h0 // R) * stride_kh
    v_ptr += batch * stride_vb + (h0 // R) * stride_vh
    start_t = t
    if DOCUMENTS:
        start_t = tl.load(start_ptr + batch * T + t, mask=real, other=0)
    first, all_from, diagonal, end = _key_range(t0, start_ptr, batch * T, T, window, QUERIES, BN, DOCUMENTS)
    dq = tl.zeros([BM, D], tl.float32)
    if SPLIT:
        dq = _gather_dq(
            dq, q, do, lse, dot, k_ptr, v_ptr, t, start_t, first, all_from, T, window, scale2,
            stride_kt, stride_vt, D, BN, True, DOCUMENTS, DT,
        )  # fmt: skip
        dq = _gather_dq(
            dq, q, do, lse, dot, k_ptr, v_ptr, t, start_t, all_from, diagonal, T, window, scale2,
            stride_kt, stride_vt, D, BN, False, DOCUMENTS, DT,
        )  # fmt: skip
        dq = _gather_dq(
            dq, q, do, lse, dot, k_ptr, v_ptr, t, start_t, diagonal, end, T, window, scale2,
            stride_kt, stride_vt, D, BN, True, DOCUMENTS, DT,
        )  # fmt: skip
    else:
        dq = _gather_dq(
            dq, q, do, lse, dot, k_ptr, v_ptr, t, start_t, first, end, T, window, scale2,
            stride_kt, stride_vt, D, BN, True, DOCUMENTS, DT,
        )  # fmt: skip
    tl.store(dq_ptr + out_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _gather_dkv(
    dk, dv, k, v, q_ptr, do_ptr, start_ptr, lse_ptr, dot_ptr, s, t0, T, window, scale2, stride_qt, stride_gt,
    D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dk += dS' Q (without the scale) and dv += P' dO for the queries [t0, t0 + BM) of one head."""
    t, dd = t0 + tl.arange(0, BM), tl.arange(0, D)
    t_wide = t[:, None].to(tl.int64)
    if MASKED:
        q = tl.load(q_ptr + t_wide * stride_qt + dd[None, :], mask=t[:, None] < T, other=0.0)
        do = tl.load(do_ptr + t_wide * stride_gt + dd[None, :], mask=t[:, None] < T, other=0.0)
        lse, dot = tl.load(lse_ptr + t, mask=t < T, other=0.0), tl.load(dot_ptr + t, mask=t < T, other=0.0)
    else:
        q, do = tl.load(q_ptr + t_wide * stride_qt + dd[None, :]), tl.load(do_ptr + t_wide * stride_gt + dd[None, :])
        lse, dot = tl.load(lse_ptr + t), tl.load(dot_ptr + t)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :])
    if MASKED:
        start_t = t
        if DOCUMENTS:
            start_t = tl.load(start_ptr + t, mask=t < T, other=0)
        p = tl.where(_visible(t[None, :], s[:, None], start_t[None, :], window, DOCUMENTS) & (t[None, :] < T), p, 0.0)
    dv = tl.dot(p.to(DT), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - dot[None, :])
    dk = tl.dot(ds.to(DT), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "H", "R", "window"])
def attention_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, start_ptr, end_ptr, lse_ptr, dot_ptr, dk_ptr, dv_ptr,
    T, H, R, window, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_gb, stride_gt, stride_gh, scale, scale2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dk and dv for BN keys of one key/value head, over all query heads that share it."""
    s0, g, batch = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lane, dd = tl.arange(0, BN), tl.arange(0, D)
    s = s0 + lane
    real = s < T
    s_wide = s[:, None].to(tl.int64)
    k = tl.load(k_ptr + batch * stride_kb + g * stride_kh + s_wide * stride_kt + dd[None, :], mask=real[:, None], other=0.0)
    v = tl.load(v_ptr + batch * stride_vb + g * stride_vh + s_wide * stride_vt + dd[None, :], mask=real[:, None], other=0.0)
    q_ptr += batch * stride_qb + g * R * stride_qh
    do_ptr += batch * stride_gb + g * R * stride_gh
    lse_ptr += (batch * H + g * R) * T
    dot_ptr += (batch * H + g * R) * T
    start_ptr += batch * T  # unused without documents

    end = tl.minimum(s0 + BN - 1 + window, T)  # queries that see any of the keys: [s0, end)
    all_end = tl.minimum(s0 + window, T)  # queries before this see the first key, if it is not after them
    if DOCUMENTS:
        end = tl.minimum(end, tl.load(end_ptr + batch * T + tl.minimum(s0 + BN, T) - 1))
        all_end = tl.minimum(all_end, tl.load(end_ptr + batch * T + s0))
    begin = s0 // BM * BM
    all_from = tl.minimum((s0 + BN - 1 + BM - 1) // BM * BM, (end + BM - 1) // BM * BM)
    all_end = tl.maximum(all_end // BM * BM, all_from)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    if SPLIT:
        for _ in range(0, R):
            for t0 in range(begin, all_from, BM):
                dk, dv = _gather_dkv(
                    dk, dv, k, v, q_ptr, do_ptr, start_ptr, lse_ptr, dot_ptr,
                    s, t0, T, window, scale2, stride_qt, stride_gt, D, BM, True, DOCUMENTS, DT,
                )  # fmt: skip
            for t0 in range(all_from, all_end, BM):
                dk, dv = _gather_dkv(
                    dk, dv, k, v, q_ptr, do_ptr, start_ptr, lse_ptr, dot_ptr,
                    s, t0, T, window, scale2, stride_qt, stride_gt, D, BM, False, DOCUMENTS, DT,
                )  # fmt: skip
            for t0 in range(all_end, end, BM):
                dk, dv = _gather_dkv(
                    dk, dv, k, v, q_ptr, do_ptr, start_ptr, lse_ptr, dot_ptr,
                    s, t0, T, window, scale2, stride_qt, stride_gt, D, BM, True, DOCUMENTS, DT,
                )  # fmt: skip
            q_ptr += stride_qh
            do_ptr += stride_gh
            lse_ptr += T
            dot_ptr += T
    else:
        blocks = (end - begin + BM - 1) // BM
        for step in range(0, R * blocks):
            r = (step // blocks).to(tl.int64)
            t0 = begin + (step % blocks) * BM
            dk, dv = _gather_dkv(
                dk, dv, k, v, q_ptr + r * stride_qh, do_ptr + r * stride_gh, start_ptr, lse_ptr + r * T, dot_ptr + r * T,
                s, t0, T, window, scale2, stride_qt, stride_gt, D, BM, True, DOCUMENTS, DT,
            )  # fmt: skip
    out_at = ((batch * T + s) * (H // R) + g)[:, None] * D + dd[None, :]
    tl.store(dk_ptr + out_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(dv_ptr + out_at, dv.to(dv_ptr.dtype.element_ty), mask=real[:, None])
