"""Attention across pieces: the keys and values that lie before this rank's piece and inside its first query's window.

Legend: b batch, t time (L tokens of this piece, past ones before it), g key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swax_megatron.parallel.context_exchange.ranks import ContextRanks


def with_past(k_btgd: Tensor, v_btgd: Tensor, past: int, ranks: ContextRanks) -> tuple[Tensor, Tensor]:
    """Keys and values (B, min(past, rank * L) + L, G, D): this piece's behind the last `past` ones of the row before it.

    past: how far a query looks back (window - 1), the same on every rank. It may reach over several pieces; each
    rank then hears from several left neighbours at once. A full-attention layer asks for the whole row: an all-gather in
    which nothing travels to the left. The gradients of what was lent come back and are added.
    Sent a rank: past * 2 * G * D elements, whatever L is, as far as there are ranks to the right.
    """
    both_btgd = _WithPast.apply(torch.cat([k_btgd, v_btgd], dim=2), past, ranks)
    return tuple(both_btgd.chunk(2, dim=2))


class _WithPast(torch.autograd.Function):
    """(B, L, N, D) -> (B, past + L, N, D). One function makes the whole, so that its backward runs on the first rank as well."""

    @staticmethod
    def forward(ctx, x: Tensor, past: int, ranks: ContextRanks) -> Tensor:
        ctx.ranks, ctx.shares = ranks, _shares(past, x.shape[1], ranks.size)
        sends, receives = [], []
        for distance, count in ctx.shares:
            if ranks.rank + distance < ranks.size:
                sends.append((ranks.rank + distance, x[:, -count:]))
            if distance <= ranks.rank:
                receives.append((ranks.rank - distance, x.new_empty(x.shape[0], count, *x.shape[2:])))
        ranks.exchange("halo", sends, receives)
        return torch.cat([*(part for _, part in reversed(receives)), x], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks: ContextRanks = ctx.ranks
        length = gradient.shape[1] - sum(count for distance, count in ctx.shares if distance <= ranks.rank)
        end = gradient.shape[1] - length  # what came from a distance ends where the nearer begins
        sends, receives = [], []
        for distance, count in ctx.shares:
            if distance <= ranks.rank:
                sends.append((ranks.rank - distance, gradient[:, end - count : end]))
                end -= count
            if ranks.rank + distance < ranks.size:
                receives.append((ranks.rank + distance, gradient.new_empty(gradient.shape[0], count, *gradient.shape[2:])))
        ranks.exchange("halo gradient", sends, receives)
        own = gradient[:, gradient.shape[1] - length :].clone()
        for _, part in receives:
            own[:, length - part.shape[1] :] += part
        return own, None, None


def _shares(past: int, length: int, size: int) -> list[tuple[int, int]]:
    """(distance, tokens): how many of its last tokens a rank lends to the rank that many pieces to its right."""
    shares = [(distance, min(length, past - (distance - 1) * length)) for distance in range(1, size)]
    return [(distance, count) for distance, count in shares if count > 0]
