"""Triton kernels for everything scalar in the mLSTM: gates, stabiliser, weights, and the gradients of the gates.

Legend: b batch, h heads (bh both, flattened), t time, c chunk, L = LC tokens in a chunk. Scalars a token and head live in
float32 arrays (B*H, C*L), padded to whole chunks; scalars a chunk in (B*H, C).

Two small passes replace a scan over the sequence: `chunk_gates` works inside each chunk and leaves one max-plus summary
(G, M) of it; `token_weights` composes the summaries before its chunk (a few hundred numbers) and turns them into the weights
the matrix kernels use. With m_in the stabiliser before a chunk and m_out after it:
    row_t = b_t - m_t            col_s = i~_s - b_s            e^(row_t + col_s) weighs key s for query t
    wq_t  = scale e^(b_t + m_in - m_t) weighs the incoming state (with q's scale)
    wk_s  = e^(g - b_s + i~_s - m_out) weighs key s in the outgoing state
    decay = e^(g + m_in - m_out) what the chunk leaves of the incoming state
"""

import triton
import triton.language as tl

from ..dependent import join

MINUS = tl.constexpr(-1e30)  # stands for -inf without its NaNs


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log1p(e^-|x|), with log1p(y) = 2 atanh(y / (2 + y)) as a series: log(1 + y) would lose a small y."""
    y = tl.exp(-tl.abs(x))
    z = y / (2.0 + y)
    w = z * z  # <= 1/9, so that nine terms reach fp32
    series = 1 / 15 + w * (1 / 17)
    series = 1 / 11 + w * (1 / 13 + w * series)
    series = 1 / 7 + w * (1 / 9 + w * series)
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * series))
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap) and its derivative in x; cap <= 0 means none. Both through e^(-2|x|/cap), in fp32."""
    y = tl.exp(-2.0 * tl.abs(x) / tl.where(cap > 0, cap, 1.0))
    tanh = (1.0 - y) / (1.0 + y)
    capped = tl.where(x < 0, -cap * tanh, cap * tanh)
    return tl.where(cap > 0, capped, x), tl.where(cap > 0, 4.0 * y / ((1.0 + y) * (1.0 + y)), 1.0)


@triton.jit
def _then(g1, m1, g2, m2):
    """Max-plus composition of two stretches: (G, M) maps m to max(G + m, M)."""
    return g1 + g2, tl.maximum(m1 + g2, m2)


@triton.jit(do_not_specialize=["T", "H", "C", "stride_ib", "stride_it", "stride_fb", "stride_ft"])
def chunk_gates(
    i_ptr, f_ptr, start_ptr, b_ptr, ig_ptr, top_ptr, g_ptr, m_ptr,
    T, H, C, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh, cap,
    LC: tl.constexpr, DOCUMENTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per chunk: capped gates, b = cumulative log forget gate, the chunk's own running stabiliser `top`, its summary (G, M)."""
    join(PDL)
    c, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    lane = tl.arange(0, LC)
    t = c * LC + lane
    real = t < T
    i_raw = tl.load(i_ptr + batch * stride_ib + t * stride_it + head * stride_ih, mask=real, other=0.0).to(tl.float32)
    f_raw = tl.load(f_ptr + batch * stride_fb + t * stride_ft + head * stride_fh, mask=real, other=0.0).to(tl.float32)
    i_capped, _ = soft_cap(i_raw, cap)
    f_capped, _ = soft_cap(f_raw, cap)
    ig = tl.where(real, i_capped, MINUS)
    lf = tl.where(real, log_sigmoid(f_capped), 0.0)
    b = tl.cumsum(lf, 0)
    step, top = lf, ig
    if DOCUMENTS:
        start = tl.load(start_ptr + batch * T + t, mask=real, other=-1)
        first = (start == t) & (t > 0)  # the stabiliser starts from 0, whatever came before
        step = tl.where(first, MINUS, step)
        top = tl.where(first, tl.maximum(lf, ig), top)
    step, top = tl.associative_scan((step, top), 0, _then)
    out = bh * C * LC + t
    tl.store(b_ptr + out, b)
    tl.store(ig_ptr + out, ig)
    tl.store(top_ptr + out, top)
    last = lane == LC - 1
    tl.store(g_ptr + bh * C + c, tl.sum(tl.where(last, step, 0.0), 0))
    tl.store(m_ptr + bh * C + c, tl.sum(tl.where(last, top, 0.0), 0))


@triton.jit(do_not_specialize=["T", "H", "C"])
def token_weights(
    b_ptr, ig_ptr, top_ptr, g_ptr, m_ptr, m0_ptr, start_ptr,
    row_ptr, col_ptr, mt_ptr, wq_ptr, wk_ptr, decay_ptr, m_final_ptr,
    T, H, C, scale,
    LC: tl.constexpr, SUMMARIES: tl.constexpr, DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per chunk: the stabiliser of every token and the weights named at the top of this file."""
    join(PDL)
    c, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch = bh // H
    m_in = 0.0
    if INITIAL:
        m_in = tl.load(m0_ptr + bh).to(tl.float32)
    lanes = tl.arange(0, SUMMARIES)
    for begin in range(0, c, SUMMARIES):  # the chunks before this one, a block of summaries at a time
        j = begin + lanes
        g = tl.load(g_ptr + bh * C + j, mask=j < c, other=0.0)
        m = tl.load(m_ptr + bh * C + j, mask=j < c, other=MINUS)
        g, m = tl.associative_scan((g, m), 0, _then)
        end = lanes == SUMMARIES - 1
        m_in = tl.maximum(tl.sum(tl.where(end, g, 0.0), 0) + m_in, tl.sum(tl.where(end, m, 0.0), 0))
    m_out = tl.maximum(tl.load(g_ptr + bh * C + c) + m_in, tl.load(m_ptr + bh * C + c))

    t = c * LC + tl.arange(0, LC)
    at = bh * C * LC + t
    b, ig, top = tl.load(b_ptr + at), tl.load(ig_ptr + at), tl.load(top_ptr + at)
    b_last = tl.load(b_ptr + (bh * C + c + 1) * LC - 1)
    m_t = tl.maximum(b + m_in, top)
    wq = tl.exp(b + (m_in - m_t))
    wk = tl.exp(b_last - b + ig - m_out)
    decay = tl.exp(b_last + (m_in - m_out))
    if DOCUMENTS:
        last = tl.minimum((c + 1) * LC, T) - 1
        start_last = tl.load(start_ptr + batch * T + last)
        start = tl.load(start_ptr + batch * T + t, mask=t < T, other=0)
        start = tl.where(t < T, start, start_last)
        reached = (start < c * LC) | (start == 0)
        m_t = tl.where(reached, m_t, top)
        wq = tl.where(reached, tl.exp(b + (m_in - m_t)), 0.0)
        wk = tl.where(start == start_last, wk, 0.0)
        kept = (start_last < c * LC) | (start_last == 0)
        decay = tl.where(kept, decay, 0.0)
    tl.store(row_ptr + at, b - m_t)
    tl.store(col_ptr + at, ig - b)
    tl.store(mt_ptr + at, m_t)
    tl.store(wq_ptr + at, wq * scale)
    tl.store(wk_ptr + at, wk)
    tl.store(decay_ptr + bh * C + c, decay)
    if c == C - 1:
        tl.store(m_final_ptr + bh, m_out)


@triton.jit(do_not_specialize=["T", "H", "C", "TILES", "stride_ib", "stride_it", "stride_fb", "stride_ft"])
def gate_gradients(
    i_ptr, f_ptr, start_ptr, row_sum_ptr, col_sum_ptr, diagonal_ptr, rq_ptr, rk_ptr, passed_ptr, di_ptr, df_ptr,
    T, H, C, TILES, stride_ib, stride_it, stride_ih, stride_fb, stride_ft, stride_fh, cap,
    LC: tl.constexpr, BLOCKS: tl.constexpr, TILE_BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw gates from sums over the pair matrix W = d(log weight of key s at query t).

    dlf_u gathers every log weight that contains lf_u: pairs s < u <= t inside the chunk (strict row minus strict column sums,
    summed from u on), queries from u on that read the incoming state, keys before u that write the outgoing one, and what
    passes through the chunk whole. di_s is W's column sum plus the key's share of the outgoing state.
    """
    join(PDL)
    c, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    t = c * LC + tl.arange(0, LC)
    real = t < T
    at = bh * C * LC + t
    rows = tl.zeros([LC], tl.float32)
    cols = tl.zeros([LC], tl.float32)
    for block in tl.static_range(BLOCKS):  # partial sums: rows over earlier key blocks, columns over later query blocks
        part = (bh * BLOCKS + block) * C * LC + t
        mine = tl.arange(0, LC) // (LC // BLOCKS)
        rows += tl.load(row_sum_ptr + part, mask=mine >= block, other=0.0)
        cols += tl.load(col_sum_ptr + part, mask=mine <= block, other=0.0)
    rq, rk = tl.load(rq_ptr + at), tl.load(rk_ptr + at)
    passed = 0.0
    for begin in range(0, TILES, TILE_BLOCK):
        tile = begin + tl.arange(0, TILE_BLOCK)
        passed += tl.sum(tl.load(passed_ptr + (bh * C + c) * TILES + tile, mask=tile < TILES, other=0.0), 0)
    dlf = tl.cumsum(rows - cols + rq, 0, reverse=True) + (tl.cumsum(rk, 0) - rk) + passed
    if DOCUMENTS:
        start = tl.load(start_ptr + batch * T + t, mask=real, other=0)
        dlf = tl.where((start == t) & (t > 0), 0.0, dlf)
    di = cols + tl.load(diagonal_ptr + at) + rk
    i_raw = tl.load(i_ptr + batch * stride_ib + t * stride_it + head * stride_ih, mask=real, other=0.0).to(tl.float32)
    f_raw = tl.load(f_ptr + batch * stride_fb + t * stride_ft + head * stride_fh, mask=real, other=0.0).to(tl.float32)
    _, di_raw = soft_cap(i_raw, cap)
    f_capped, df_raw = soft_cap(f_raw, cap)
    di = di * di_raw
    df = dlf / (1.0 + tl.exp(f_capped)) * df_raw
    out = (batch * T + t) * H + head
    tl.store(di_ptr + out, di, mask=real)
    tl.store(df_ptr + out, df, mask=real)
