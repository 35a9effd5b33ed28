"""The loss's functions of raw logits in plain torch. Legend as in `__init__.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(raw_nv: Tensor, real: int, cap: float | None) -> Tensor:
    """Logits in fp32 or wider: the soft cap first, then -inf on the vocabulary's padding, which can then never take probability."""
    logits_nv = raw_nv.to(torch.promote_types(raw_nv.dtype, torch.float32))
    if cap:
        logits_nv = cap * torch.tanh(logits_nv / cap)
    if real < logits_nv.shape[-1]:
        padding_v = torch.arange(logits_nv.shape[-1], device=logits_nv.device) >= real
        logits_nv = logits_nv.masked_fill(padding_v, float("-inf"))
    return logits_nv


def _local(targets_n: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """A column for every target (0 where it lies elsewhere), and whether it lies here."""
    here_n = (targets_n >= 0) & (targets_n < columns)
    return targets_n.masked_fill(~here_n, 0), here_n


def logit_statistics_reference(raw_nv: Tensor, targets_n: Tensor, real: int, cap: float | None) -> tuple[Tensor, Tensor]:
    logits_nv = capped(raw_nv, real, cap)
    local_n, here_n = _local(targets_n, logits_nv.shape[-1])
    chosen_n = logits_nv.gather(-1, local_n.unsqueeze(-1)).squeeze(-1).masked_fill(~here_n, 0.0)
    return logits_nv.logsumexp(-1), chosen_n


def logit_gradients_reference(
    raw_nv: Tensor, targets_n: Tensor, log_partition_n: Tensor, d_log_partition_n: Tensor, d_chosen_n: Tensor, real: int, cap: float | None
) -> Tensor:
    logits_nv = capped(raw_nv, real, cap)
    local_n, here_n = _local(targets_n, logits_nv.shape[-1])
    # d log-partition / d logit is the probability; d chosen / d logit is 1 at the target
    d_logits_nv = (logits_nv - log_partition_n.unsqueeze(-1)).exp_().mul_(d_log_partition_n.unsqueeze(-1))
    rows_n = torch.arange(len(local_n), device=local_n.device)
    d_logits_nv[rows_n, local_n] += d_chosen_n.masked_fill(~here_n, 0.0)
    if cap:  # the derivative of c * tanh(x / c); padding has none
        slope_nv = 1.0 - (logits_nv / cap).square_()
        d_logits_nv.mul_(slope_nv.masked_fill_(torch.isinf(slope_nv), 0.0))
    return d_logits_nv.to(raw_nv.dtype)
