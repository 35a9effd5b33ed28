"""Causal sliding-window attention: one entry point over the plain-torch reference and the Triton kernels.

Legend: b batch, t time (keys may be more than queries), h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import check_cu_seqlens, document_bounds, log_once, triton_missing
from .reference import swa_blocked

__all__ = ["swa", "swa_blocked"]

_log = logging.getLogger(__name__)
MOST_QUERIES_A_TILE = 128  # a multiple of every tile's number of queries
_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def swa(
    q_bthd: Tensor,
    k_btgd: Tensor,
    v_btgd: Tensor,
    window: int,
    *,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention over a sliding window: a query sees itself and the window - 1 keys before it, in its document.

    q (B, T, H, D), k and v (B, S, G, D) with G dividing H (query heads h*H/G ... share key head h). S may exceed T: the queries
    are then the last T of the row's S tokens (its earlier keys came from elsewhere). window >= 1, and a window of S or more is
    full causal attention. cu_seqlens: int32 document boundaries over the flattened B*S (see `kernels.documents`); None: each row
    is one document. softmax_scale: default D^-0.5. backend: "reference", "triton" (an error
    where it cannot), or "auto": Triton for bfloat16 and float16 on a tested GPU and head size, else the reference, said once in
    the log.

    Returns (B, T, H, D) in q's dtype; softmax in float32. Time and memory O(T * window). Raises ValueError naming the argument.
    """
    _check(q_bthd, k_btgd, v_btgd, window, cu_seqlens, backend)
    if softmax_scale is not None and not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be > 0, got {softmax_scale!r}")
    if _use_triton(backend, q_bthd):
        from .triton_op import attend

        start, end = (None, None) if cu_seqlens is None else document_bounds(cu_seqlens, *k_btgd.shape[:2])
        scale = q_bthd.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        length, window = q_bthd.shape[1], min(window, k_btgd.shape[1])
        if k_btgd.shape[1] == length:
            return attend(q_bthd, k_btgd, v_btgd, window, start, end, scale)
        q_bthd, k_btgd, v_btgd, start, end = _beside_idle_queries(q_bthd, k_btgd, v_btgd, start, end)
        return attend(q_bthd, k_btgd, v_btgd, window, start, end, scale)[:, -length:]
    with torch.autocast(q_bthd.device.type, enabled=False):
        return swa_blocked(q_bthd, k_btgd, v_btgd, window, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale)


def _beside_idle_queries(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None) -> tuple[Tensor, ...]:
    """The kernels pair every key with a query: zero queries for the earlier keys, which look at themselves alone and so cost next
    to nothing. They fill whole tiles, because a tile takes its first key from its first query's document.
    """
    batch, total = k.shape[:2]
    padding = -(total - q.shape[1]) % MOST_QUERIES_A_TILE
    if start is None:
        start, end = (torch.full((batch, total), edge, dtype=torch.int32, device=k.device) for edge in (0, total))
    idle = padding + total - q.shape[1]
    k, v = (F.pad(x, (0, 0, 0, 0, padding, 0)) for x in (k, v))
    own = torch.arange(idle, dtype=torch.int32, device=k.device).expand(batch, idle)
    start = torch.cat([own, start[:, idle - padding :] + padding], 1)
    end = torch.cat([own[:, :padding] + 1, end + padding], 1)
    return F.pad(q, (0, 0, 0, 0, idle, 0)), k, v, start, end


def _use_triton(backend: str, q: Tensor) -> bool:
    """Whether the kernels take this call; for backend "triton" a ValueError if they cannot."""
    if backend == "reference":
        return False
    reason = triton_missing(q.device)
    if reason is None:
        from .triton_op import HEAD_SIZES

        if q.shape[-1] not in HEAD_SIZES:
            reason = f"head size {q.shape[-1]} has no kernel; there are {', '.join(str(d) for d in HEAD_SIZES)}"
        elif q.dtype == torch.float64 or (q.dtype == torch.float32 and q.is_cuda):
            reason = f"the kernels take bfloat16 and float16, not {q.dtype}"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot run this attention: {reason}; use 'reference' or 'auto'")
    if backend == "auto":
        name = "sliding-window attention"
        log_once(_log, f"{name}: Triton kernels" if reason is None else f"{name}: plain-torch reference ({reason})")
    return reason is None


def _check(q, k, v, window, cu_seqlens, backend) -> None:
    """Every argument error, before any work."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.ndim != 4 or 0 in x.shape:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of shape (B, T, heads, D) with no empty dimension, got {found}")
    if q.dtype not in _INPUT_DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; it must be one of {', '.join(str(d) for d in _INPUT_DTYPES)}")
    batch, length, heads, d = q.shape
    for name in ("k", "v"):
        x = named[name]
        if x.shape[0] != batch or x.shape[1] < length or x.shape[3] != d:
            raise ValueError(f"{name} must have shape ({batch}, {length} or more, kv_heads, {d}), got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: they must agree")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if heads % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which do not divide the {heads} heads of q")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an integer >= 1, got {window!r}")
    check_cu_seqlens(cu_seqlens, batch, k.shape[1], q.device)
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
