"""Why a model remembers or not: horizons of the forget gates, clamped denominators, gate saturation, states, attention.

Everything is measured on the inputs of one batch. Legend: b batch, t tokens, h heads, k query-key size, v value size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SATURATED = 0.9  # share of the soft cap from which a gate counts as saturated
BLOCK = 256  # queries of one block of scores


@dataclass(frozen=True)
class MlstmMemory:
    """One value a head, each (h,).

    horizon: tokens over which the memory decays by a factor e, 1 / mean(-log f)
    clamped: share of steps whose denominator is the clamp e^-m instead of |q.n|
    input_saturated, forget_saturated: share of gate values beyond 0.9 of the soft cap
    state_norm: natural logarithm of the Frobenius norm of the last true state C
    """

    horizon: Tensor
    clamped: Tensor
    input_saturated: Tensor
    forget_saturated: Tensor
    state_norm: Tensor


def mlstm_memory(q_bthk: Tensor, k_bthk: Tensor, v_bthv: Tensor, igate_bth: Tensor, fgate_bth: Tensor, cap: float) -> MlstmMemory:
    """Statistics of one mLSTM layer. igate, fgate: raw pre-activations (before the soft cap); rows are one document each.

    The denominator and the state are those of the recurrent form (docs/kernels.md), computed in blocks of queries.
    """
    q, k, v = (x.float().transpose(1, 2) for x in (q_bthk, k_bthk, v_bthv))  # b h t .
    capped_i, capped_f = (cap * torch.tanh(gate.float().transpose(1, 2) / cap) for gate in (igate_bth, fgate_bth))
    log_f = F.logsigmoid(capped_f)
    decay = log_f.cumsum(-1)  # b h t
    source = capped_i - decay  # what a key weighs, but for the decay up to the query
    m = torch.maximum(decay, decay + source.cummax(-1).values)  # the state starts at m = 0
    q = q * q.shape[-1] ** -0.5
    length, clamped = q.shape[2], []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        weight = decay[:, :, start:stop, None] + source[:, :, None, :stop] - m[:, :, start:stop, None]
        later = torch.arange(stop, device=q.device)[None] > torch.arange(start, stop, device=q.device)[:, None]
        scores = (q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)) * weight.masked_fill(later, -math.inf).exp()
        clamped.append((scores.sum(-1).abs() < torch.exp(-m[:, :, start:stop])).float().mean((0, 2)))
    sizes = torch.tensor([min(BLOCK, length - start) for start in range(0, length, BLOCK)], device=q.device)
    last = torch.exp(decay[:, :, -1:] + source - m[:, :, -1:])
    state = torch.einsum("bht,bhtk,bhtv->bhkv", last, k, v)
    log_norm = torch.log(state.flatten(-2).norm(dim=-1).clamp(min=1e-38)) + m[:, :, -1]
    return MlstmMemory(
        horizon=1.0 / (-log_f.mean((0, 2))).clamp(min=1e-9),
        clamped=(torch.stack(clamped) * sizes[:, None]).sum(0) / length,
        input_saturated=(capped_i.abs() > SATURATED * cap).float().mean((0, 2)),
        forget_saturated=(capped_f.abs() > SATURATED * cap).float().mean((0, 2)),
        state_norm=log_norm.mean(0),
    )


@dataclass(frozen=True)
class AttentionUse:
    """One value a query head, each (h,). largest_logit: largest scaled score; entropy: mean over queries, nats."""

    largest_logit: Tensor
    entropy: Tensor


def attention_use(q_bthd: Tensor, k_bthd: Tensor, window: int) -> AttentionUse:
    """Statistics of one attention layer whose rows are one document each. q, k: after the rotary positions; fewer key heads allowed."""
    q, k = (x.float().transpose(1, 2) for x in (q_bthd, k_bthd))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    length = q.shape[2]
    largest, entropy = [], torch.zeros(q.shape[1], device=q.device)
    for start in range(0, length, BLOCK):
        stop, first = min(start + BLOCK, length), max(0, start - window + 1)
        scores = (q[:, :, start:stop] @ k[:, :, first:stop].transpose(-1, -2)) * q.shape[-1] ** -0.5
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)[None]
        scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
        largest.append(scores.amax((0, 2, 3)))
        log_weights = scores.log_softmax(-1)
        entropy -= (log_weights.exp() * log_weights.nan_to_num(neginf=0.0)).sum(-1).mean(0).sum(-1)
    return AttentionUse(torch.stack(largest).amax(0), entropy / length)


Report = Callable[[str, Tensor], None]  # name such as "memory/layer_03/horizon", values a head


def report_mlstm(report: Report, layer: int, found: MlstmMemory) -> None:
    """Tell every statistic of a layer under its TensorBoard name."""
    for name, values in vars(found).items():
        report(f"memory/layer_{layer:02}/{name}", values)


def report_attention(report: Report, layer: int, found: AttentionUse) -> None:
    """Tell every statistic of a layer under its TensorBoard name."""
    for name, values in vars(found).items():
        report(f"attention/layer_{layer:02}/{name}", values)
