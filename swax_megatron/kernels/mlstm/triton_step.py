"""Triton kernels for one decoding step of the mLSTM, which overwrites the state: C is read once and written once.

Legend: bh batch and head, flattened; K = d_qk, V = d_v. State: C (B*H, K, V), n (B*H, K), m (B*H), all float32. Every program of
`decode_step` reads the old n and m of its head, so that they are overwritten by a launch of their own, `decode_normaliser`.
"""

import triton
import triton.language as tl

from .triton_gates import log_sigmoid, soft_cap


@triton.jit
def _weights(i_ptr, f_ptr, m_ptr, bh, batch, head, stride_ib, stride_ih, stride_fb, stride_fh, cap):
    """What the old memory keeps, the weight of the new token, and the new m."""
    ig, _ = soft_cap(tl.load(i_ptr + batch * stride_ib + head * stride_ih).to(tl.float32), cap)
    fg, _ = soft_cap(tl.load(f_ptr + batch * stride_fb + head * stride_fh).to(tl.float32), cap)
    lf = log_sigmoid(fg)
    m = tl.load(m_ptr + bh)
    m_new = tl.maximum(lf + m, ig)
    return tl.exp(lf + (m - m_new)), tl.exp(ig - m_new), m_new


@triton.jit(do_not_specialize=["H", "stride_qb", "stride_kb", "stride_vb", "stride_ib", "stride_fb"])
def decode_step(
    q_ptr, k_ptr, v_ptr, i_ptr, f_ptr, c_ptr, n_ptr, m_ptr, h_ptr,
    H, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ib, stride_ih, stride_fb, stride_fh,
    scale, cap, eps, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """h for BV features of one head, and that slice of C in place."""
    v0, bh = tl.program_id(0) * BV, tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    dk, dv = tl.arange(0, BK), v0 + tl.arange(0, BV)
    keep, write, m_new = _weights(i_ptr, f_ptr, m_ptr, bh, batch, head, stride_ib, stride_ih, stride_fb, stride_fh, cap)
    v = tl.load(v_ptr + batch * stride_vb + head * stride_vh + dv).to(tl.float32)
    num = tl.zeros([BV], tl.float32)
    den = 0.0
    for k0 in tl.static_range(0, K, BK):
        q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + k0 + dk).to(tl.float32) * scale
        k = tl.load(k_ptr + batch * stride_kb + head * stride_kh + k0 + dk).to(tl.float32) * write
        at = c_ptr + bh * K * V + (k0 + dk)[:, None] * V + dv[None, :]
        c = keep * tl.load(at) + k[:, None] * v[None, :]
        tl.store(at, c)
        num += tl.sum(q[:, None] * c, 0)
        den += tl.sum(q * (keep * tl.load(n_ptr + bh * K + k0 + dk) + k), 0)
    h = num / (tl.maximum(tl.abs(den), tl.exp(-m_new)) + eps)
    tl.store(h_ptr + bh * V + dv, h.to(h_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["H", "stride_kb", "stride_ib", "stride_fb"])
def decode_normaliser(
    k_ptr, i_ptr, f_ptr, n_ptr, m_ptr, H, stride_kb, stride_kh, stride_ib, stride_ih, stride_fb, stride_fh, cap, K: tl.constexpr,
):  # fmt: skip
    """n and m of one head in place."""
    bh = tl.program_id(0).to(tl.int64)
    batch, head = bh // H, bh % H
    keep, write, m_new = _weights(i_ptr, f_ptr, m_ptr, bh, batch, head, stride_ib, stride_ih, stride_fb, stride_fh, cap)
    dk = tl.arange(0, K)
    k = tl.load(k_ptr + batch * stride_kb + head * stride_kh + dk).to(tl.float32) * write
    at = n_ptr + bh * K + dk
    tl.store(at, keep * tl.load(at) + k)
    tl.store(m_ptr + bh, m_new)
