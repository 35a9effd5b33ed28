"""Triton kernels for SwiGLU's activation, rotary positions and the mLSTM's scalar gates, forward and backward.

Each element is read once, computed with in float32, and written once in its tensor's type. Sums over rows are made of parts in a
fixed order (no atomics). Offsets are int64; row counts are run-time numbers, widths are compiled in.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(lane, left, WIDTH: tl.constexpr):
    """lane < left. Where rows are multiples of 16, said in groups of 16: the compiler then reads and writes whole groups at once."""
    left = tl.minimum(left, 1 << 30).to(tl.int32)
    if WIDTH % 16 == 0:
        real = lane // 16 < left // 16
    else:
        real = lane < left
    return real


@triton.jit(do_not_specialize=["ROWS"])
def swiglu(gate_ptr, up_ptr, y_ptr, ROWS, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """y = silu(gate) up over (ROWS, WIDTH), all contiguous."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    real = _inside(lane, ROWS.to(tl.int64) * WIDTH - base, WIDTH)
    gate = tl.load(gate_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + base + lane, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["ROWS"])
def swiglu_gradients(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, ROWS, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of gate and up; silu'(x) = s (1 + x (1 - s)) with s the logistic function of x."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    real = _inside(lane, ROWS.to(tl.int64) * WIDTH - base, WIDTH)
    dy = tl.load(dy_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * (share * (1.0 + gate * (1.0 - share)))
    dup = dy * (gate * share)
    tl.store(dgate_ptr + base + lane, dgate.to(dgate_ptr.dtype.element_ty), mask=real)
    tl.store(dup_ptr + base + lane, dup.to(dup_ptr.dtype.element_ty), mask=real)


@triton.jit
def _turn(
    x_ptr, y_ptr, cos, sin, batch, t, head, t_real, HEADS,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, HALF: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Both halves of some tokens' heads. cos, sin: (tokens, 1, PADDED)."""
    dd = tl.arange(0, PADDED)[None, None, :]
    real = t_real[:, None, None] & (head < HEADS)[None, :, None]
    if PADDED != HALF:
        real = real & (dd < HALF)
    x_at = (batch * stride_xb + t * stride_xt)[:, None, None] + (head * stride_xh)[None, :, None] + dd
    y_at = (batch * stride_yb + t * stride_yt)[:, None, None] + (head * stride_yh)[None, :, None] + dd
    first = tl.load(x_ptr + x_at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + x_at + HALF, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_at, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=real)
    tl.store(y_ptr + y_at + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["T", "H", "G"])
def rotary(
    q_ptr, k_ptr, positions_ptr, frequencies_ptr, yq_ptr, yk_ptr, T, H, G,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_yb, stride_yt, stride_yh, stride_zb, stride_zt, stride_zh,
    HALF: tl.constexpr, PADDED: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """q or k turned by its positions (BACK: by minus them). A program has BT tokens and BH heads: first those of q, then those of k."""
    block, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    t_real = t < T
    dd = tl.arange(0, PADDED)
    position = tl.load(positions_ptr + batch * T + t, mask=t_real, other=0).to(tl.float32)
    frequency = tl.load(frequencies_ptr + dd, mask=dd < HALF, other=0.0)
    angle = position[:, None, None] * frequency[None, None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACK:
        sin = -sin
    of_q = tl.cdiv(H, BH)
    if block < of_q:
        head = block * BH + tl.arange(0, BH)
        _turn(
            q_ptr, yq_ptr, cos, sin, batch, t, head, t_real, H,
            stride_qb, stride_qt, stride_qh, stride_yb, stride_yt, stride_yh, HALF, PADDED,
        )  # fmt: skip
    else:
        head = (block - of_q) * BH + tl.arange(0, BH)
        _turn(
            k_ptr, yk_ptr, cos, sin, batch, t, head, t_real, G,
            stride_kb, stride_kt, stride_kh, stride_zb, stride_zt, stride_zh, HALF, PADDED,
        )  # fmt: skip


@triton.jit
def _stacked(i_ptr, f_ptr, gate, stride, at, real, N: tl.constexpr):
    """Element `at` of the N input gates' rows above the N forget gates' rows, `stride` elements a row; zeros below and where not real."""
    i = tl.load(i_ptr + gate * stride + at, mask=real & (gate < N), other=0.0).to(tl.float32)
    f = tl.load(f_ptr + (gate - N) * stride + at, mask=real & (gate >= N) & (gate < 2 * N), other=0.0).to(tl.float32)
    return i + f


@triton.jit(do_not_specialize=["ROWS"])
def gate_values(
    x_ptr, wi_ptr, bi_ptr, wf_ptr, bf_ptr, i_ptr, f_ptr, ROWS, stride_x,
    WIDTH: tl.constexpr, N: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """x W' + b of BM rows for all gates: GATES columns, of which the first 2 N are real."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r_real = row < ROWS
    gate, dd = tl.arange(0, GATES), tl.arange(0, BD)
    values = tl.zeros([BM, GATES], tl.float32)
    for d in range(0, WIDTH, BD):
        real = r_real[:, None]
        if WIDTH % BD != 0:
            real = real & (d + dd < WIDTH)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + (d + dd)[None, :], mask=real, other=0.0)
        w = _stacked(wi_ptr, wf_ptr, gate[None, :], WIDTH, (d + dd)[:, None], (d + dd < WIDTH)[:, None], N)
        values = tl.dot(x.to(DT), w.to(DT), values, input_precision="tf32x3")
    values += _stacked(bi_ptr, bf_ptr, gate, 1, 0, gate >= 0, N)[None, :]
    at = row[:, None] * N + gate[None, :]
    tl.store(i_ptr + at, values, mask=r_real[:, None] & (gate < N)[None, :])
    tl.store(f_ptr + at - N, values, mask=r_real[:, None] & (gate >= N)[None, :] & (gate < 2 * N)[None, :])


@triton.jit(do_not_specialize=["ROWS"])
def gate_gradients(
    di_ptr, df_ptr, x_ptr, wi_ptr, wf_ptr, dx_ptr, dw_ptr, ROWS, stride_x,
    WIDTH: tl.constexpr, N: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx (ROWS, WIDTH, contiguous) and this program's share of the weights' gradient, for BD of the columns and every so many rows."""
    d, split, splits = tl.program_id(0) * BD + tl.arange(0, BD), tl.program_id(1), tl.num_programs(1)
    gate, rows = tl.arange(0, GATES), tl.arange(0, BM)
    d_real = d < WIDTH
    w = _stacked(wi_ptr, wf_ptr, gate[:, None], WIDTH, d[None, :], d_real[None, :], N)
    dw = tl.zeros([GATES, BD], tl.float32)
    for begin in range(split * BM, ROWS, splits * BM):
        row = (begin + rows).to(tl.int64)
        r_real = row < ROWS
        real = r_real[:, None]
        if WIDTH % BD != 0:
            real = real & d_real[None, :]
        # read twice, either way up: a transposed operand has been compiled wrongly
        g = _stacked(di_ptr, df_ptr, gate[None, :], 1, row[:, None] * N, r_real[:, None], N)
        g_turned = _stacked(di_ptr, df_ptr, gate[:, None], 1, row[None, :] * N, r_real[None, :], N)
        x = tl.load(x_ptr + row[:, None] * stride_x + d[None, :], mask=real, other=0.0).to(tl.float32)
        dx = tl.dot(g, w, input_precision="tf32x3")
        tl.store(dx_ptr + row[:, None] * WIDTH + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=real)
        dw = tl.dot(g_turned, x, dw, input_precision="tf32x3")
    tl.store(dw_ptr + (split * GATES + gate)[:, None] * WIDTH + d[None, :], dw, mask=d_real[None, :])
