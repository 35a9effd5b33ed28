"""The mLSTM cell in plain torch: chunkwise (the one to use), recurrent (and one decoding step) and parallel (an oracle).

Legend: b batch, t time (s: key time), h heads, k = d_qk, v = d_v, n chunk, l position in a chunk (s: key position), e = d_v + 1.

All three compute, from raw gates i~ = cap(igate), lf = logsigmoid(cap(fgate)), cap(x) = gate_cap * tanh(x / gate_cap),
    m_t = max(lf_t + m_{t-1}, i~_t)                                  m_0 = 0 at the start of every document
    C_t = e^(lf_t + m_{t-1} - m_t) C_{t-1} + e^(i~_t - m_t) k_t v_t'     and n_t the same with v = 1
    h_t = q_t' C_t / (max(|q_t' n_t|, e^-m_t) + eps)                 q scaled by d_qk^-0.5
(Beck et al. 2024, "xLSTM", eqs. 19-27; the chunkwise form follows Beck et al. 2025, "Tiled Flash Linear Attention", section 3.)
m only keeps the exponentials in range: it is never differentiated. Everything is float32, or float64 for float64 inputs.
Because n is C with v = 1, both live in one matrix: values carry a column of ones, whose output is the denominator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import document_numbers
from .state import MlstmState

NEG_INF = float("-inf")


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself when cap is None."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _prepare(q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth, gate_cap):
    """Work dtype, scaled q, k, [v | 1], capped input gate and log forget gate."""
    dtype = torch.float64 if q_bthk.dtype == torch.float64 else torch.float32
    q = q_bthk.to(dtype) * q_bthk.shape[-1] ** -0.5
    ve = F.pad(v_bthv.to(dtype), (0, 1), value=1.0)
    return dtype, q, k_bthk.to(dtype), ve, soft_cap(igate_bth.to(dtype), gate_cap), F.logsigmoid(soft_cap(fgate_bth.to(dtype), gate_cap))


def _initial(state: MlstmState | None, q_bthk: Tensor, v_bthv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[C | n] (B, H, K, V+1) and m (B, H) before the first token."""
    batch, _, heads, d_qk = q_bthk.shape
    if state is None:
        state = MlstmState.empty(batch, heads, d_qk, v_bthv.shape[-1], device=q_bthk.device, dtype=dtype)
    return torch.cat([state.c_bhkv.to(dtype), state.n_bhk.to(dtype)[..., None]], -1), state.m_bh.detach().to(dtype)


def _sums_between(lf: Tensor) -> Tensor:
    """(..., L) -> (..., L, L): element (l, s) is the sum of lf over s < u <= l, for s <= l (above, nothing meaningful).

    Summed directly rather than as b_l - b_s: that difference, and still more its gradient, drowns in rounding where the forget
    gates are nearly shut (the true gradient is then e^f~ times smaller than the terms that would have to cancel).
    """
    size = lf.shape[-1]
    after = torch.ones(size, size, dtype=torch.bool, device=lf.device).tril(-1)
    terms = lf[..., :, None] * after  # (u, s)
    if lf.device.type == "cpu":
        return torch.ones(size, size, dtype=lf.dtype).tril() @ terms  # faster there than a cumulative sum
    return terms.cumsum(-2)


def _finish(numerator_and_den: Tensor, m: Tensor, eps: float) -> Tensor:
    """h = N / (max(|D|, e^-m) + eps) from [N | D] in m's scale; m lacks the last dimension."""
    num, den = numerator_and_den[..., :-1], numerator_and_den[..., -1]
    return num / (torch.maximum(den.abs(), torch.exp(-m)) + eps)[..., None]


def mlstm_chunkwise(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    igate_bth: Tensor,
    fgate_bth: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: MlstmState | None = None,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Tensor, MlstmState]:
    """The cell over a sequence, one batched product inside all chunks and a short loop over chunk states.

    Shapes: q, k (B, T, H, K), v (B, T, H, V), gates (B, T, H); any T. Cost per token and head O(chunk_size * (K + V) + K * V).
    Returns h (B, T, H, V) in v's dtype and the state after the last token (that of each row's last document).
    """
    batch, length, heads, d_qk = q_bthk.shape
    dtype, q, k, ve, ig, lf = _prepare(q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth, gate_cap)
    ce_bhke, m_bh = _initial(initial_state, q_bthk, v_bthv, dtype)
    size = min(chunk_size, length)
    chunks = -(-length // size)
    tail = chunks * size - length

    def split(x: Tensor, value: float = 0.0) -> Tensor:
        """(B, T, H, ...) -> (B, N, H, L, ...); the padding stores nothing (i~ = -inf) and forgets nothing (lf = 0)."""
        if tail:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, tail), value=value)
        return x.unflatten(1, (chunks, size)).transpose(2, 3)

    q, k, ve, ig, lf = split(q), split(k), split(ve), split(ig, NEG_INF), split(lf)

    # the log weight of key s at query l, what of the incoming state reaches a token
    causal_ls = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if cu_seqlens is None:
        visible, reached = causal_ls, None
        b_bnhl = lf.cumsum(-1)
    else:
        doc = document_numbers(cu_seqlens, batch, length)
        doc_bnl = torch.cat([doc, doc[:, -1:].expand(batch, tail)], 1).view(batch, chunks, size)
        before_bn = torch.cat([doc[:, :1], doc_bnl[:, :-1, -1]], 1)  # the document of the incoming state
        visible = (causal_ls & (doc_bnl[..., :, None] == doc_bnl[..., None, :]))[:, :, None]
        reached = (doc_bnl == before_bn[..., None])[:, :, None]  # (B, N, 1, L)
        b_bnhl = torch.where(visible, lf[..., None, :], 0.0).sum(-1)  # a sum per document: nothing crosses, not even rounding
    d_bnhls = (_sums_between(lf) + ig[..., None, :]).masked_fill(~visible, NEG_INF)
    g_bnh, a_bnhl = b_bnhl[..., -1], d_bnhls[..., -1, :]  # from the chunk's start, and from each token, to its end
    kept_bn1 = None if reached is None else reached[..., -1]  # the incoming state outlives the chunk

    with torch.no_grad():  # the stabiliser: a max-plus scan over chunks, then over tokens
        top_bnh, incoming = a_bnhl.amax(-1), []
        for n in range(chunks):
            incoming.append(m_bh)
            carried = m_bh if kept_bn1 is None else torch.where(kept_bn1[:, n], m_bh, 0.0)
            m_bh = torch.maximum(g_bnh[:, n] + carried, top_bnh[:, n])
        m_in = torch.stack(incoming, 1)
        m_out = torch.cat([m_in[:, 1:], m_bh[:, None]], 1)
        m_in_l = m_in[..., None] if reached is None else torch.where(reached, m_in[..., None], 0.0)
        m_bnhl = torch.maximum(b_bnhl + m_in_l, d_bnhls.amax(-1))

    # chunk states; `m_in - m_out` first: the difference of near numbers is exact, so a rounded m costs nothing
    decay_bnh = torch.exp(g_bnh + (m_in - m_out))
    if kept_bn1 is not None:
        decay_bnh = torch.where(kept_bn1, decay_bnh, 0.0)
    update_bnhke = (k * torch.exp(a_bnhl - m_out[..., None])[..., None]).transpose(-1, -2) @ ve
    states = []
    for decay, update in zip(decay_bnh.unbind(1), update_bnhke.unbind(1), strict=True):
        states.append(ce_bhke)
        ce_bhke = torch.addcmul(update, decay[..., None, None], ce_bhke)

    # outputs: what the chunk itself holds, and what came in
    p_bnhls = (q @ k.transpose(-1, -2)) * torch.exp(d_bnhls - m_bnhl[..., None])
    scale_bnhl = torch.exp(b_bnhl + (m_in_l - m_bnhl))
    if reached is not None:
        scale_bnhl = torch.where(reached, scale_bnhl, 0.0)
    out = p_bnhls @ ve + (q * scale_bnhl[..., None]) @ torch.stack(states, 1)
    h = _finish(out, m_bnhl, eps).transpose(2, 3).flatten(1, 2)[:, :length]
    return h.to(v_bthv.dtype), MlstmState(ce_bhke[..., :-1], ce_bhke[..., -1], m_bh)


def mlstm_step(
    q_bhk: Tensor,
    k_bhk: Tensor,
    v_bhv: Tensor,
    igate_bh: Tensor,
    fgate_bh: Tensor,
    state: MlstmState,
    *,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
) -> tuple[Tensor, MlstmState]:
    """One token of decoding: q, k (B, H, K), v (B, H, V), gates (B, H). Returns h (B, H, V) in v's dtype and the new state."""
    dtype, q, k, _, ig, lf = _prepare(q_bhk, k_bhk, v_bhv, igate_bh, fgate_bh, gate_cap)
    v, c, n, m = v_bhv.to(dtype), state.c_bhkv.to(dtype), state.n_bhk.to(dtype), state.m_bh.detach().to(dtype)
    m_new = torch.maximum(lf + m, ig).detach()
    keep, write = torch.exp(lf + (m - m_new))[..., None], torch.exp(ig - m_new)[..., None]
    c = keep[..., None] * c + (write * k)[..., :, None] * v[..., None, :]
    n = keep * n + write * k
    num = (q[..., None, :] @ c).squeeze(-2)
    h = _finish(torch.cat([num, (q * n).sum(-1, keepdim=True)], -1), m_new, eps)
    return h.to(v_bhv.dtype), MlstmState(c, n, m_new)


def mlstm_recurrent(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    igate_bth: Tensor,
    fgate_bth: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: MlstmState | None = None,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
) -> tuple[Tensor, MlstmState]:
    """The definition itself, token by token. Shapes and results as `mlstm_chunkwise`."""
    batch, length, heads, d_qk = q_bthk.shape
    dtype = torch.float64 if q_bthk.dtype == torch.float64 else torch.float32
    state = initial_state or MlstmState.empty(batch, heads, d_qk, v_bthv.shape[-1], device=q_bthk.device, dtype=dtype)
    doc = None if cu_seqlens is None else document_numbers(cu_seqlens, batch, length)
    outputs = []
    for t in range(length):
        if doc is not None and t > 0:
            old = (doc[:, t] == doc[:, t - 1])[:, None]
            state = MlstmState(
                torch.where(old[..., None, None], state.c_bhkv, 0.0),
                torch.where(old[..., None], state.n_bhk, 0.0),
                torch.where(old, state.m_bh, 0.0),
            )
        step = (q_bthk[:, t], k_bthk[:, t], v_bthv[:, t], igate_bth[:, t], fgate_bth[:, t], state)
        h_bhv, state = mlstm_step(*step, gate_cap=gate_cap, eps=eps)
        outputs.append(h_bhv)
    return torch.stack(outputs, 1), state


def mlstm_parallel(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    igate_bth: Tensor,
    fgate_bth: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
) -> Tensor:
    """One T x T matrix, no state: an oracle, O(T^2) in time and memory. Shapes as `mlstm_chunkwise`; returns h alone."""
    batch, length = q_bthk.shape[:2]
    prepared = _prepare(q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth, gate_cap)[1:]
    q, k, ve, ig, lf = (x.transpose(1, 2) for x in prepared)
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if cu_seqlens is not None:
        doc = document_numbers(cu_seqlens, batch, length)
        visible = (visible & (doc[:, :, None] == doc[:, None, :]))[:, None]
    total_bht = torch.where(visible, lf[..., None, :], 0.0).sum(-1)
    d_bhts = (_sums_between(lf) + ig[..., None, :]).masked_fill(~visible, NEG_INF)
    m_bht = torch.maximum(d_bhts.amax(-1), total_bht).detach()
    out = ((q @ k.transpose(-1, -2)) * torch.exp(d_bhts - m_bht[..., None])) @ ve
    return _finish(out, m_bht, eps).transpose(1, 2).to(v_bthv.dtype)


def mlstm_fused_reference(h_bthv: Tensor, ogate_bthv: Tensor, norm_weight: Tensor, norm_eps: float) -> Tensor:
    """sigmoid(ogate) * LayerNorm over each head's features of h (mean subtracted, weight (H * V) alone), in float32 or float64.

    Returns (B, T, H, V) in ogate's dtype.
    """
    dtype = torch.float64 if h_bthv.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(h_bthv.to(dtype), h_bthv.shape[-1:], eps=norm_eps) * norm_weight.to(dtype).view(h_bthv.shape[2:])
    return (normed * torch.sigmoid(ogate_bthv.to(dtype))).to(ogate_bthv.dtype)
