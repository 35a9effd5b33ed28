"""From raw logits to what the loss needs of them, and their gradient: soft cap, padding, log-partition, the target's logit.

Entry points over a plain-torch reference and Triton kernels. The kernels read the logits once as they come from the matrix product and
never hold them in float32; the gradient overwrites them.
Legend: n tokens, v vocabulary rows of this rank.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..documents import log_once, triton_missing
from .reference import capped, logit_gradients_reference, logit_statistics_reference

__all__ = ["capped", "logit_gradients", "logit_statistics"]

_log = logging.getLogger(__name__)


def logit_statistics(raw_nv: Tensor, targets_n: Tensor, real: int, cap: float | None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Log-partition over the first ``real`` columns and the target's logit, both (n,) in float32 or wider.

    raw: the matrix product's result; targets: column of every token's target, any number outside 0..v-1 where it lies on another rank
    (its logit is then 0); cap: logits are cap * tanh(raw / cap), None: raw itself. real may be 0 or less: the log-partition is then -inf.
    """
    if not _uses_triton(raw_nv, backend):
        return logit_statistics_reference(raw_nv, targets_n, real, cap)
    from .triton_launch import statistics

    return statistics(raw_nv, targets_n, real, cap)


def logit_gradients(
    raw_nv: Tensor,
    targets_n: Tensor,
    log_partition_n: Tensor,
    d_log_partition_n: Tensor,
    d_chosen_n: Tensor,
    real: int,
    cap: float | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The gradient of ``raw``, in its type, from those of the log-partition (over all ranks) and of the target's logit.

    ``raw`` is overwritten or left alone: use the result only.
    """
    given = (targets_n, log_partition_n, d_log_partition_n, d_chosen_n, real, cap)
    if not _uses_triton(raw_nv, backend):
        return logit_gradients_reference(raw_nv, *given)
    from .triton_launch import gradients

    return gradients(raw_nv, *given)


def _uses_triton(raw_nv: Tensor, backend: str) -> bool:
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
    if backend == "reference":
        return False
    reason = triton_missing(raw_nv.device)
    if reason is None and raw_nv.dtype == torch.float64:
        reason = "the kernels do not take float64"
    elif reason is None and backend == "auto" and raw_nv.dtype != torch.bfloat16:
        reason = f"tested in training with bfloat16, not {raw_nv.dtype}"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot run the loss: {reason}; use 'reference' or 'auto'")
    if backend == "auto":
        log_once(_log, "loss: Triton kernels" if reason is None else f"loss: plain torch ({reason})")
    return reason is None
