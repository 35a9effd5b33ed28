"""RMSNorm on the residual stream (Zhang and Sennrich 2019), alone or together with the stream that passes by it.

Entry points over plain torch and Triton kernels. In backward the kernel adds the gradient of the stream that passed by, so that no
pass of its own adds the two up. Legend: r rows (tokens), x hidden size.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import log_once, triton_missing

__all__ = ["rms_norm", "rms_norm_beside"]

_log = logging.getLogger(__name__)
_WIDEST = 16384  # a row lies in registers


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 and rounded once; x (..., X), weight (X,)."""
    if not _uses_triton(x, backend):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    from .triton_op import RmsNorm

    return RmsNorm.apply(x, weight, eps)


def rms_norm_beside(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x itself and its norm: x -> (x, rms_norm(x)), for a residual connection. The gradients of both meet in one kernel."""
    if not _uses_triton(x, backend):
        return x, F.rms_norm(x, (x.shape[-1],), weight, eps)
    from .triton_op import RmsNormBeside

    return RmsNormBeside.apply(x, weight, eps)


def _uses_triton(x: Tensor, backend: str) -> bool:
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
    if backend == "reference":
        return False
    reason = triton_missing(x.device)
    if reason is None and x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reason = f"the kernels do not take {x.dtype}"
    elif reason is None and backend == "auto" and x.dtype != torch.bfloat16:
        reason = f"the kernels are meant for bfloat16, not {x.dtype}"
    if reason is None and x.shape[-1] > _WIDEST:
        reason = f"rows of {x.shape[-1]} elements are wider than {_WIDEST}"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot run RMSNorm: {reason}; use 'reference' or 'auto'")
    if backend == "auto":
        log_once(_log, "RMSNorm: Triton kernels" if reason is None else f"RMSNorm: plain torch ({reason})")
    return reason is None
