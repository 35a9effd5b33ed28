"""The mLSTM cell: one entry point over the plain-torch reference and the Triton kernels.

Legend: b batch, t time, h heads, k = d_qk, v = d_v.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..documents import check_cu_seqlens, log_once
from .reference import mlstm_chunkwise, mlstm_parallel, mlstm_recurrent, mlstm_step
from .state import MlstmState

__all__ = ["MlstmState", "mlstm", "mlstm_chunkwise", "mlstm_parallel", "mlstm_recurrent", "mlstm_step"]

_log = logging.getLogger(__name__)
_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mlstm(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    igate_bth: Tensor,
    fgate_bth: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: MlstmState | None = None,
    return_final_state: bool = False,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, MlstmState]:
    """The mLSTM cell with its complete gradient (the normaliser's included).

    q, k (B, T, H, d_qk), k unscaled and q scaled by d_qk^-0.5 inside; v (B, T, H, d_v); igate, fgate (B, T, H): raw
    pre-activations with their bias, in float32 (float64 for float64 inputs), capped inside by gate_cap * tanh(x / gate_cap).
    cu_seqlens: int32 document boundaries over the flattened B*T (see `kernels.documents`); the memory starts from nothing and
    m = 0 at each; None: each row is one document. initial_state belongs to the first document of each row, the final state to
    its last. chunk_size shapes the work of the reference, not the result.

    Returns h (B, T, H, d_v) in the inputs' dtype, with `return_final_state` also the state after the last token.
    Raises ValueError naming the argument that is wrong. Source: design as in `reference.py`.
    """
    _check(q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth, cu_seqlens, initial_state, gate_cap, eps, chunk_size, backend)
    if backend == "triton":
        raise ValueError("backend 'triton' is not available for the mLSTM in this build: use 'reference' or 'auto'")
    if backend == "auto":
        log_once(_log, f"mLSTM on {q_bthk.device.type}: plain-torch reference")
    with torch.autocast(q_bthk.device.type, enabled=False):
        h, state = mlstm_chunkwise(
            q_bthk,
            k_bthk,
            v_bthv,
            igate_bth,
            fgate_bth,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            gate_cap=gate_cap,
            eps=eps,
            chunk_size=chunk_size,
        )
    return (h, state) if return_final_state else h


def _check(q, k, v, igate, fgate, cu_seqlens, initial_state, gate_cap, eps, chunk_size, backend) -> None:
    """Every argument error, before any work."""
    named = {"q": q, "k": k, "v": v, "igate": igate, "fgate": fgate}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must have shape (B, T, H, d_qk) with no empty dimension, got {tuple(q.shape)}")
    batch, length, heads, d_qk = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"v must have shape ({batch}, {length}, {heads}, d_v), got {tuple(v.shape)}")
    for name in ("igate", "fgate"):
        if named[name].shape != q.shape[:3]:
            raise ValueError(f"{name} must have shape {tuple(q.shape[:3])}, got {tuple(named[name].shape)}")
    if q.dtype not in _INPUT_DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; it must be one of {', '.join(str(d) for d in _INPUT_DTYPES)}")
    for name in ("k", "v"):
        if named[name].dtype != q.dtype:
            raise ValueError(f"{name} has dtype {named[name].dtype} but q has {q.dtype}: they must agree")
    gate_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name in ("igate", "fgate"):
        if named[name].dtype != gate_dtype:
            raise ValueError(f"{name} has dtype {named[name].dtype}; gates must be {gate_dtype} (compute the gate projection in it)")
    for name, x in named.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}: move it there")
    check_cu_seqlens(cu_seqlens, batch, length, q.device)
    if initial_state is not None:
        d_v = v.shape[3]
        expected = {"c_bhkv": (batch, heads, d_qk, d_v), "n_bhk": (batch, heads, d_qk), "m_bh": (batch, heads)}
        for (name, shape), x in zip(expected.items(), initial_state, strict=True):
            if x.shape != shape or x.dtype != gate_dtype or x.device != q.device:
                found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
                raise ValueError(f"initial_state.{name} must be {shape} {gate_dtype} on {q.device}, got {found}")
    if gate_cap is not None and not gate_cap > 0:
        raise ValueError(f"gate_cap must be positive, or None for no cap, got {gate_cap}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
