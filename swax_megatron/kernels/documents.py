"""What both kernels share: packed documents (`cu_seqlens`: checks, document numbers, bounds) and the choice of a backend.

`cu_seqlens` is an int32 vector (N+1,) of boundaries over the flattened (B*T) tokens, from 0 to B*T, not decreasing, and every
row end is one of them: a document never spans two rows. Repeated boundaries are empty documents and mean nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_bounds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # cu_seqlens -> ((version, batch, length), bounds)

TESTED_CAPABILITY = (9, 0)  # Hopper: where every shipped tile size was checked against float64


def check_cu_seqlens(cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise ValueError unless `cu_seqlens` is None or valid for (batch, length) tokens on `device`.

    Values are read only where that costs no device synchronisation (CPU tensors).
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        what = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens must be an int32 vector of at least 2 boundaries, got {what}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but the inputs are on {device}: move it there")
    if cu_seqlens.device.type != "cpu":
        return
    total = batch * length
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise ValueError(f"cu_seqlens must start at 0 and end at B*T = {total}, got {int(cu_seqlens[0])} and {int(cu_seqlens[-1])}")
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError("cu_seqlens must not decrease")
    row_ends = torch.arange(1, batch, dtype=torch.int32) * length
    if not bool(torch.isin(row_ends, cu_seqlens).all()):
        raise ValueError(f"cu_seqlens must hold every row end (multiples of T = {length}): a document cannot span two rows")


def document_numbers(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int64: the document of each token, not decreasing along a row."""
    tokens = torch.arange(batch * length, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).view(batch, length)


def document_bounds(cu_seqlens: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """(B, T) int32 twice: within its row, the first token of each token's document and one past its last.

    Layers of one pass ask for the same: kept as long as `cu_seqlens` lives and torch counts no change of it. Not inside a captured graph,
    which may be replayed after a change. Bounds belong to the stream that they were first asked for on.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or cu_seqlens.is_inference() or capturing():
        return _document_bounds(cu_seqlens, batch, length)
    key, known = (cu_seqlens._version, batch, length), _bounds.get(cu_seqlens)
    if known is None or known[0] != key:
        known = _bounds[cu_seqlens] = key, _document_bounds(cu_seqlens, batch, length)
    return known[1]


def capturing() -> bool:
    """Whether a CUDA graph is being captured: memory made now belongs to it, and nothing is computed yet."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _document_bounds(cu_seqlens: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    document = document_numbers(cu_seqlens, batch, length)
    row = torch.arange(batch, device=cu_seqlens.device, dtype=torch.int32)[:, None] * length
    return cu_seqlens[document] - row, cu_seqlens[document + 1] - row


@functools.cache
def triton_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None if they can. Interpreted kernels (TRITON_INTERPRET=1) run on any."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels do not run on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == TESTED_CAPABILITY else f"compute capability {capability} is untested, only {TESTED_CAPABILITY} was tested"


@functools.cache
def log_once(logger: logging.Logger, message: str) -> None:
    """Log `message` at INFO the first time it is asked for in this process."""
    logger.info(message)
