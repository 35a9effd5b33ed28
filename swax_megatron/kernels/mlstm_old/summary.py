"""What a stretch of a sequence does to an mLSTM memory: its own contribution and how much it leaves of what came in.

Legend: b batch, t time, h heads, k = d_qk, v = d_v.

With F = sum of lf over the stretch and a_t = (sum of lf after t) + i~_t, the memory after the stretch is
    m_out = max(F + m_in, m)    C_out = e^(F + m_in - m_out) C_in + e^(m - m_out) C
    C = sum_t e^(a_t - m) k_t v_t'    n = sum_t e^(a_t - m) k_t    m = max_t a_t
One weighted product of keys and values, with no loop over chunks: a third of the cell's forward work or less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import NEG_INF, soft_cap


class MlstmSummary(NamedTuple):
    """c_bhkv (B, H, d_qk, d_v), n_bhk (B, H, d_qk) in the scale e^m; m_bh (B, H); g_bh (B, H) the summed log forget gate, -inf where
    nothing of the incoming memory is left. float32 (float64 for float64 inputs). Gradients flow through c, n and g, not through m.
    """

    c_bhkv: Tensor
    n_bhk: Tensor
    m_bh: Tensor
    g_bh: Tensor


def mlstm_summary(
    k_bthk: Tensor, v_bthv: Tensor, igate_bth: Tensor, fgate_bth: Tensor, start_b: Tensor, *, gate_cap: float | None = 15.0
) -> MlstmSummary:
    """The summary of a stretch as seen by its last document; inputs as those of `mlstm`.

    start_b: (B,) int64, where in the stretch the document of the row's last token begins; negative: before the stretch.
    Only then is g finite; else the document's own start from m = 0 is part of m.
    """
    dtype = torch.float64 if k_bthk.dtype == torch.float64 else torch.float32
    with torch.autocast(k_bthk.device.type, enabled=False):
        ig, lf = soft_cap(igate_bth.to(dtype), gate_cap), F.logsigmoid(soft_cap(fgate_bth.to(dtype), gate_cap))
        inside_bt1 = (torch.arange(k_bthk.shape[1], device=start_b.device) >= start_b[:, None])[..., None]
        from_bth = torch.where(inside_bt1, lf, 0.0).flip(1).cumsum(1).flip(1)
        after_bth = F.pad(from_bth[:, 1:], (0, 0, 0, 1))  # summed without lf_t rather than subtracting it: nothing cancels
        a_bth = torch.where(inside_bt1, after_bth + ig, NEG_INF)
        passes_b1, g_bh = (start_b < 0)[:, None], from_bth[:, 0]
        m_bh = a_bth.detach().amax(1)
        m_bh = torch.where(passes_b1, m_bh, torch.maximum(m_bh, g_bh.detach()))
        c_bhkv, n_bhk = _Contribution.apply(k_bthk, v_bthv, torch.exp(a_bth - m_bh[:, None]))
        return MlstmSummary(c_bhkv, n_bhk, m_bh, torch.where(passes_b1, g_bh, NEG_INF))


class _Contribution(torch.autograd.Function):
    """C = sum_t w_t k_t v_t' and n = sum_t w_t k_t, keeping nothing but the inputs, which the cell keeps as well."""

    @staticmethod
    def forward(ctx, k_bthk: Tensor, v_bthv: Tensor, weight_bth: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k_bthk, v_bthv, weight_bth)
        weighted_bthk = k_bthk.to(weight_bth.dtype) * weight_bth[..., None]
        return _product(weighted_bthk.permute(0, 2, 3, 1), v_bthv.transpose(1, 2), v_bthv.dtype), weighted_bthk.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dc_bhkv: Tensor, dn_bhk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_bthk, v_bthv, weight_bth = ctx.saved_tensors
        dtype = v_bthv.dtype
        reply_bthk = _product(v_bthv.transpose(1, 2), dc_bhkv.transpose(-1, -2), dtype).transpose(1, 2) + dn_bhk[:, None]
        dweight_bth = (k_bthk.to(weight_bth.dtype) * reply_bthk).sum(-1)  # from unrounded sums: gates feel their rounding
        dv_bthv = _product(k_bthk.transpose(1, 2), dc_bhkv, dtype).transpose(1, 2) * weight_bth[..., None]
        return (reply_bthk * weight_bth[..., None]).to(k_bthk.dtype), dv_bthv.to(dtype), dweight_bth


def _product(x_bhij: Tensor, y_bhjl: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y summed in float32 (float64); for half-precision inputs on a GPU from bfloat16 operands, as in the cell's kernels."""
    if dtype in (torch.bfloat16, torch.float16) and x_bhij.is_cuda:
        x, y = (z.to(torch.bfloat16).flatten(0, 1) for z in (x_bhij, y_bhjl))
        return torch.bmm(x, y, out_dtype=torch.float32).unflatten(0, x_bhij.shape[:2])
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return x_bhij.to(accumulator) @ y_bhjl.to(accumulator)
