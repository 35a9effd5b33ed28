"""The backward pass of sliding-window attention in one pass over the pairs: five products a block instead of seven.

dk and dv gather over the queries as in `attention_dkv`; each block's share of dq is added to a float32 buffer in memory, in
whatever order programs arrive: the bits of dq differ from run to run. Pays for wide windows; the two passes of
`triton_kernels.py` stay the deterministic way.

q_rows, do_rows: tensor descriptors of blocks (1, BM, 1, D).

Legend as in `triton_kernels.py`. ADD: how dq is added: 1 atomics by pointer, 2 bulk reductions through a tensor descriptor of rows
(B*H*T, D), 3 the same of columns, (B*H*D, TP) with TP = T rounded up to 16 bytes (dq' = K' dS, no transposed accumulator).
"""

import triton
import triton.language as tl

from .triton_kernels import _visible


@triton.jit(do_not_specialize=["T", "H"])
def row_dots(
    do_ptr, o_ptr, dot_ptr, sum_ptr, T, H, TP, stride_gb, stride_gt, stride_gh, D: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """<do, o> of every query, and zeros where dq will be summed."""
    t, h, batch = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dd = tl.arange(0, D)
    real = t < T
    row = t.to(tl.int64)
    do = tl.load(do_ptr + batch * stride_gb + h * stride_gh + row[:, None] * stride_gt + dd[None, :], mask=real[:, None], other=0.0)
    o = tl.load(o_ptr + ((batch * T + row) * H + h)[:, None] * D + dd[None, :], mask=real[:, None], other=0.0)
    tl.store(dot_ptr + (batch * H + h) * T + t, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), mask=real)
    if ADD == 3:
        at = ((batch * H + h) * D + dd)[:, None] * TP + row[None, :]
        tl.store(sum_ptr + at, tl.zeros([D, BM], tl.float32), mask=(t < TP)[None, :])
    else:
        at = ((batch * H + h) * T + row)[:, None] * D + dd[None, :]
        tl.store(sum_ptr + at, tl.zeros([BM, D], tl.float32), mask=real[:, None])


@triton.jit(do_not_specialize=["T", "H"])
def finish_dq(sum_ptr, dq_ptr, T, H, TP, scale, D: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr):
    """dq (B, T, H, D) from its float32 sums."""
    t, h, batch = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dd = tl.arange(0, D)
    real = (t < T)[:, None]
    row = t.to(tl.int64)
    if ADD == 3:
        dq = tl.trans(tl.load(sum_ptr + ((batch * H + h) * D + dd)[:, None] * TP + row[None, :], mask=(t < T)[None, :], other=0.0))
    else:
        dq = tl.load(sum_ptr + ((batch * H + h) * T + row)[:, None] * D + dd[None, :], mask=real, other=0.0)
    tl.store(dq_ptr + ((batch * T + row) * H + h)[:, None] * D + dd[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=real)


@triton.jit
def _gather(
    dk, dv, k, v, q_rows, do_rows, start_ptr, lse_ptr, dot_ptr, sums, bh, s, t0, T, H, window, scale2,
    D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, ADD: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dk += dS' Q, dv += P' dO, and dq of the queries [t0, t0 + BM) of one head += dS K (without the scale)."""
    t, dd = t0 + tl.arange(0, BM), tl.arange(0, D)
    batch, head = (bh // H).to(tl.int32), (bh % H).to(tl.int32)
    q = q_rows.load([batch, t0, head, 0]).reshape(BM, D)  # zeros past the end
    do = do_rows.load([batch, t0, head, 0]).reshape(BM, D)
    lse_ptr += bh * T
    dot_ptr += bh * T
    if MASKED:
        lse, dot = tl.load(lse_ptr + t, mask=t < T, other=0.0), tl.load(dot_ptr + t, mask=t < T, other=0.0)
    else:
        lse, dot = tl.load(lse_ptr + t), tl.load(dot_ptr + t)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :])
    if MASKED:
        start_t = t
        if DOCUMENTS:
            start_t = tl.load(start_ptr + t, mask=t < T, other=0)
        p = tl.where(_visible(t[None, :], s[:, None], start_t[None, :], window, DOCUMENTS) & (t[None, :] < T), p, 0.0)
    dv = tl.dot(p.to(DT), do, dv, input_precision="ieee")
    ds = (p * (tl.dot(v, tl.trans(do), input_precision="ieee") - dot[None, :])).to(DT)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    if ADD == 3:
        sums.atomic_add([(bh * D).to(tl.int32), t0], tl.dot(tl.trans(k), ds, input_precision="ieee"))
    else:
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        if ADD == 2:
            sums.atomic_add([(bh * T + t0).to(tl.int32), 0], dq)
        else:
            tl.atomic_add(sums + (bh * T + t0) * D + tl.arange(0, BM)[:, None] * D + dd[None, :], dq, mask=t[:, None] < T, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["T", "H", "R", "window"])
def attention_gradients(
    q_rows, do_rows, k_ptr, v_ptr, start_ptr, end_ptr, lse_ptr, dot_ptr, sums, dk_ptr, dv_ptr,
    T, H, R, window, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, scale, scale2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, DOCUMENTS: tl.constexpr, ADD: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """dk and dv for BN keys of one key/value head, over all query heads that share it, and their share of those heads' dq."""
    s0, g, batch = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lane, dd = tl.arange(0, BN), tl.arange(0, D)
    s = s0 + lane
    real = s < T
    s_wide = s[:, None].to(tl.int64)
    k = tl.load(k_ptr + batch * stride_kb + g * stride_kh + s_wide * stride_kt + dd[None, :], mask=real[:, None], other=0.0)
    v = tl.load(v_ptr + batch * stride_vb + g * stride_vh + s_wide * stride_vt + dd[None, :], mask=real[:, None], other=0.0)
    bh = batch * H + g * R
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
        for r in range(0, R):
            for t0 in range(begin, all_from, BM):
                dk, dv = _gather(
                    dk, dv, k, v, q_rows, do_rows, start_ptr, lse_ptr, dot_ptr, sums, bh + r,
                    s, t0, T, H, window, scale2, D, BM, True, DOCUMENTS, ADD, DT,
                )  # fmt: skip
            for t0 in range(all_from, all_end, BM):
                dk, dv = _gather(
                    dk, dv, k, v, q_rows, do_rows, start_ptr, lse_ptr, dot_ptr, sums, bh + r,
                    s, t0, T, H, window, scale2, D, BM, False, DOCUMENTS, ADD, DT,
                )  # fmt: skip
            for t0 in range(all_end, end, BM):
                dk, dv = _gather(
                    dk, dv, k, v, q_rows, do_rows, start_ptr, lse_ptr, dot_ptr, sums, bh + r,
                    s, t0, T, H, window, scale2, D, BM, True, DOCUMENTS, ADD, DT,
                )  # fmt: skip
    else:
        blocks = (end - begin + BM - 1) // BM
        for step in range(0, R * blocks):
            r = (step // blocks).to(tl.int64)
            t0 = begin + (step % blocks) * BM
            dk, dv = _gather(
                dk, dv, k, v, q_rows, do_rows, start_ptr, lse_ptr, dot_ptr, sums, bh + r,
                s, t0, T, H, window, scale2, D, BM, True, DOCUMENTS, ADD, DT,
            )  # fmt: skip
    out_at = ((batch * T + s) * (H // R) + g)[:, None] * D + dd[None, :]
    tl.store(dk_ptr + out_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(dv_ptr + out_at, dv.to(dv_ptr.dtype.element_ty), mask=real[:, None])
