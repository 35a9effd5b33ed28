"""mLSTM memory across pieces: an exclusive scan over ranks of what each piece leaves behind.

Legend: b batch, h heads, k = d_qk, v = d_v, e = d_v + 1 (C and n side by side), p ranks. G_r, m_r, X_r = [C | n]: the summary of
piece r (`kernels.mlstm.summary`), G_r = -inf where a document begins inside the piece.

With the stabilisers known to all (an all-gather of two scalars a head), the scan is linear with decays at most 1:
    m_out_r = max(G_r + m_in_r, m_r)    m_in_(r+1) = m_out_r
    Y_r = e^(G_r + m_in_r - m_out_r) Y_(r-1) + e^(m_r - m_out_r) X_r    and rank r begins with Y_(r-1)
It takes ceil(log2 P) rounds of one message of the size of a memory (Hillis & Steele 1986), forward and backward; no rank waits
for another's cell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swax_megatron.kernels.mlstm import MlstmState
from swax_megatron.kernels.mlstm.summary import MlstmSummary
from swax_megatron.parallel.context_exchange.ranks import ContextRanks


def incoming_memory(summary: MlstmSummary, continues_b: Tensor, ranks: ContextRanks) -> MlstmState:
    """The memory with which this rank's piece begins, from the summaries of all pieces before it.

    continues_b: (B,) bool, whether the piece's first token continues the document of the token before it; where it does
    not, the memory is empty. Differentiable in the summary's C, n and G, on every rank.
    """
    g_pbh, m_pbh = ranks.all_gather("stabilisers", torch.stack([summary.g_bh.detach(), summary.m_bh])).unbind(1)
    m_in, decays = torch.zeros_like(summary.m_bh), []
    for rank in range(ranks.size):
        m_out = torch.maximum(g_pbh[rank] + m_in, m_pbh[rank])
        decays.append(torch.exp(g_pbh[rank] + (m_in - m_out)))
        if rank == ranks.rank:
            m_begin, m_end = m_in, m_out
        m_in = m_out
    own_bhke = torch.cat([summary.c_bhkv, summary.n_bhk[..., None]], dim=-1)
    written_bhke = own_bhke * torch.exp(summary.m_bh - m_end)[..., None, None]
    before_bhke = _Before.apply(written_bhke, summary.g_bh, torch.stack(decays), ranks)
    before_bhke = torch.where(continues_b[:, None, None, None], before_bhke, 0.0)
    return MlstmState(before_bhke[..., :-1], before_bhke[..., -1], torch.where(continues_b[:, None], m_begin, 0.0))


class _Before(torch.autograd.Function):
    """Y_(r-1) of Y_r = decay_r Y_(r-1) + x_r. g: log of this rank's decay, for its gradient alone."""

    @staticmethod
    def forward(ctx, x: Tensor, g_bh: Tensor, decay_pbh: Tensor, ranks: ContextRanks) -> Tensor:
        before = _scan(x, decay_pbh, ranks, "memory", reverse=False)
        ctx.ranks = ranks
        ctx.save_for_backward(before, decay_pbh)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        before, decay_pbh = ctx.saved_tensors
        dx = _scan(gradient, decay_pbh, ctx.ranks, "memory gradient", reverse=True)  # that of Y_r as well
        dg_bh = decay_pbh[ctx.ranks.rank] * (dx * before).sum((-2, -1))
        return dx, dg_bh, None, None


def _scan(x: Tensor, decay_pbh: Tensor, ranks: ContextRanks, kind: str, *, reverse: bool) -> Tensor:
    """Sum over ranks q before this one of x_q times the decays of the ranks between (``reverse``: over those behind it)."""
    sign = -1 if reverse else 1
    place = ranks.size - 1 - ranks.rank if reverse else ranks.rank
    decay = decay_pbh.flip(0) if reverse else decay_pbh
    total, before = x, torch.zeros_like(x)  # of the last `step` places with, and without, this one
    step = 1
    while step < ranks.size:
        sends = [(ranks.rank + sign * step, total)] if place + step < ranks.size else []
        receives = [(ranks.rank - sign * step, torch.empty_like(x))] if place >= step else []
        ranks.exchange(kind, sends, receives)
        for _, earlier in receives:
            between = decay[place - step + 1 : place].prod(0)
            before = before + between[..., None, None] * earlier
            total = total + (between * decay[place])[..., None, None] * earlier
        step *= 2
    return before
