"""Triton kernels for what follows the cell: per-head LayerNorm times sigmoid of the output gate, forward and backward.

y = (h - mean) rstd weight * sigmoid(o), statistics over one head's V features, in float32 (Beck et al. 2024, the mLSTM block).
Rows are (token, head). h and dh lie as (B*T*H, V); o, y and their gradients have strides of their own, the last is 1.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ROWS", "T", "H"])
def norm_gate(
    h_ptr, o_ptr, weight_ptr, y_ptr, ROWS, T, H, stride_ob, stride_ot, stride_oh, stride_yb, stride_yt, stride_yh, eps,
    V: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y for BR rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    dv = tl.arange(0, V)
    real = (row < ROWS)[:, None]
    token, head = row // H, row % H
    batch, t = token // T, token % T
    h = tl.load(h_ptr + row[:, None] * V + dv[None, :], mask=real, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + (batch * stride_ob + t * stride_ot + head * stride_oh)[:, None] + dv[None, :], mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + head[:, None] * V + dv[None, :]).to(tl.float32)
    centred = h - (tl.sum(h, 1) / V)[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / V + eps)
    y = centred * rstd[:, None] * weight / (1.0 + tl.exp(-o))
    y_at = (batch * stride_yb + t * stride_yt + head * stride_yh)[:, None] + dv[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["TOKENS", "T", "H"])
def norm_gate_gradients(
    dy_ptr, h_ptr, o_ptr, weight_ptr, dh_ptr, do_ptr, dot_ptr, dw_ptr, TOKENS, T, H,
    stride_gb, stride_gt, stride_gh, stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, eps,
    V: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dh, do, <dh, h> per row, and this program's share of the weight's gradient (summed afterwards, in a fixed order)."""
    program, programs, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    dv = tl.arange(0, V)
    weight = tl.load(weight_ptr + head * V + dv).to(tl.float32)[None, :]
    dw = tl.zeros([V], tl.float32)
    for begin in range(program * BR, TOKENS, programs * BR):
        token = (begin + tl.arange(0, BR)).to(tl.int64)
        real = (token < TOKENS)[:, None]
        batch, t = token // T, token % T
        at = (token * H + head)[:, None] * V + dv[None, :]
        dy_at = (batch * stride_gb + t * stride_gt + head * stride_gh)[:, None] + dv[None, :]
        o_at = (batch * stride_ob + t * stride_ot + head * stride_oh)[:, None] + dv[None, :]
        dy = tl.load(dy_ptr + dy_at, mask=real, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + o_at, mask=real, other=0.0).to(tl.float32)
        centred = h - (tl.sum(h, 1) / V)[:, None]
        rstd = (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / V + eps))[:, None]
        normed = centred * rstd
        gate = 1.0 / (1.0 + tl.exp(-o))
        d_gated = dy * gate
        dw += tl.sum(d_gated * normed, 0)
        d_o = dy * normed * weight * gate * (1.0 - gate)
        d_normed = d_gated * weight
        mean, along = (tl.sum(d_normed, 1) / V)[:, None], (tl.sum(d_normed * normed, 1) / V)[:, None]
        dh = (rstd * (d_normed - mean - normed * along)).to(dh_ptr.dtype.element_ty)
        do_at = (batch * stride_db + t * stride_dt + head * stride_dh)[:, None] + dv[None, :]
        tl.store(dh_ptr + at, dh, mask=real)
        tl.store(do_ptr + do_at, d_o.to(do_ptr.dtype.element_ty), mask=real)
        tl.store(dot_ptr + token * H + head, tl.sum(dh.to(tl.float32) * h, 1), mask=token < TOKENS)
    tl.store(dw_ptr + (program * H + head) * V + dv, dw)
