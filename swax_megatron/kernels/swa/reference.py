"""Causal sliding-window attention in plain torch, in O(T * window) time and memory.

Legend: b batch, t time, h query heads, g key/value heads (grouped queries), r = h / g queries heads per key/value head, d head size,
n block of queries, l position in a block, j position in the block's slice of keys.

A query at t sees the keys t - window + 1 ... t of its own document. Queries are cut into blocks of L; a block reads the slice of
L + window - 1 keys that ends with it, so every block has the same shape and all of them are one batched product. Keys may begin
before the queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import document_numbers

MIN_BLOCK = 16  # smaller blocks save no time: the products become too thin


def swa_blocked(
    q_bthd: Tensor, k_btgd: Tensor, v_btgd: Tensor, window: int, *, cu_seqlens: Tensor | None = None, softmax_scale: float | None = None
) -> Tensor:
    """Softmax attention over the last `window` keys. q (B, T, H, D), k and v (B, S, G, D), S >= T, G divides H; any T, window >= 1.

    The queries are the last T of the S tokens, over which cu_seqlens runs. Scores and softmax in float32 (float64 for float64
    inputs). Returns (B, T, H, D) in q's dtype.
    """
    batch, length, heads, d = q_bthd.shape
    groups = k_btgd.shape[2]
    dtype = torch.float64 if q_bthd.dtype == torch.float64 else torch.float32
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    total = k_btgd.shape[1]
    before = total - length  # keys before the first query
    window = min(window, total)
    block = min(length, max(MIN_BLOCK, -(-window // 2)))  # slices of 1.5 windows: half a window of waste, three copies of the keys
    past = window - 1
    if window == total:
        block, past = length, before  # full causal attention: one block that reads all keys
    blocks = -(-length // block)
    tail = blocks * block - length

    def slices(x_btgd: Tensor) -> Tensor:
        """(B, S, G, D) -> (B, N, G, J, D): each block's slice of keys, zeros before the sequence."""
        x = F.pad(x_btgd[:, max(before - past, 0) :].to(dtype), (0, 0, 0, 0, max(past - before, 0), tail))
        return x.unfold(1, block + past, block).transpose(-1, -2)

    q = F.pad(q_bthd.to(dtype) * scale, (0, 0, 0, 0, 0, tail))
    q = q.view(batch, blocks, block, groups, heads // groups, d).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # (B, N, G, R*L, D)

    # from the first query on, query l of block n is at n*L + l, key j of its slice at n*L + j - past
    distance_lj = torch.arange(block, device=q.device)[:, None] + past - torch.arange(block + past, device=q.device)
    key_nj = torch.arange(blocks, device=q.device)[:, None] * block + torch.arange(block + past, device=q.device) - past
    visible = ((distance_lj >= 0) & (distance_lj < window)) & (key_nj >= -before)[:, None, :]
    if cu_seqlens is None:
        visible = visible[None, :, None, None]  # (1, N, 1, 1, L, J)
    else:
        doc = document_numbers(cu_seqlens, batch, total)
        first, last = doc[:, :1].expand(batch, max(past - before, 0)), doc[:, -1:].expand(batch, tail)
        doc = torch.cat([first, doc[:, max(before - past, 0) :], last], 1)
        doc_bnj = doc.unfold(1, block + past, block)
        visible = (visible & (doc_bnj[:, :, past:, None] == doc_bnj[:, :, None, :]))[:, :, None, None]

    scores = (q @ slices(k_btgd).transpose(-1, -2)).unflatten(3, (heads // groups, block))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).flatten(3, 4)
    out = (weights @ slices(v_btgd)).unflatten(3, (heads // groups, block))  # (B, N, G, R, L, D)
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(batch, blocks * block, heads, d)
    return out[:, :length].to(q_bthd.dtype)
