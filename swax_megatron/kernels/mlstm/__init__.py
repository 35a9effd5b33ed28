"""The mLSTM cell: entry points over the plain-torch reference and the Triton kernels.

Legend: b batch, t time, h heads, k = d_qk, v = d_v.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..documents import check_cu_seqlens, document_bounds, log_once, triton_missing
from .reference import mlstm_chunkwise, mlstm_fused_reference, mlstm_parallel, mlstm_recurrent
from .reference import mlstm_step as mlstm_step_reference
from .state import MlstmState

__all__ = ["MlstmState", "mlstm", "mlstm_chunkwise", "mlstm_fused", "mlstm_parallel", "mlstm_recurrent", "mlstm_step"]

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
    its last. chunk_size shapes the work of the reference, not the result. backend: "reference", "triton" (an error where it
    cannot), or "auto": Triton for bfloat16 on a tested GPU and shape, else the reference, said once in the log.

    Returns h (B, T, H, d_v) in the inputs' dtype, with `return_final_state` also the state after the last token.
    Raises ValueError naming the argument that is wrong. Source: Beck et al. 2024 and 2025, equations in `reference.py`.
    """
    inputs = (q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth)
    _check(*inputs, cu_seqlens, initial_state, gate_cap, eps, chunk_size, backend)
    if _use_triton(backend, q_bthk, v_bthv):
        from .triton_op import mlstm_cell

        start = None if cu_seqlens is None else document_bounds(cu_seqlens, *q_bthk.shape[:2])[0]
        h, state = mlstm_cell(*inputs, start, initial_state, return_final_state, gate_cap, eps)
    else:
        with torch.autocast(q_bthk.device.type, enabled=False):
            h, state = mlstm_chunkwise(
                *inputs, cu_seqlens=cu_seqlens, initial_state=initial_state, gate_cap=gate_cap, eps=eps, chunk_size=chunk_size
            )
    return (h, MlstmState(*(x.contiguous() for x in state))) if return_final_state else h


def mlstm_fused(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    igate_bth: Tensor,
    fgate_bth: Tensor,
    ogate_bthv: Tensor,
    norm_weight: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: MlstmState | None = None,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Tensor:
    """sigmoid(ogate) * per-head LayerNorm(mlstm(...)) in one operator, with its complete gradient.

    ogate (B, T, H, d_v): raw output gate; norm_weight (H * d_v,); the norm subtracts the mean, has no bias, and its statistics
    over d_v are float32. Everything else as `mlstm`, the initial state and its gradient included. Returns (B, T, H, d_v) in ogate's
    dtype.
    """
    inputs = (q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth)
    _check(*inputs, cu_seqlens, initial_state, gate_cap, eps, chunk_size, backend)
    if ogate_bthv.shape != v_bthv.shape or ogate_bthv.device != v_bthv.device:
        raise ValueError(f"ogate must have v's shape {tuple(v_bthv.shape)} on {v_bthv.device}, got {tuple(ogate_bthv.shape)}")
    features = v_bthv.shape[2] * v_bthv.shape[3]
    if norm_weight.shape != (features,) or norm_weight.device != v_bthv.device:
        raise ValueError(f"norm_weight must have shape ({features},) on {v_bthv.device}, got {tuple(norm_weight.shape)}")
    if _use_triton(backend, q_bthk, v_bthv):
        from .triton_op import mlstm_fused_cell

        start = None if cu_seqlens is None else document_bounds(cu_seqlens, *q_bthk.shape[:2])[0]
        return mlstm_fused_cell(*inputs, ogate_bthv, norm_weight.contiguous(), start, initial_state, gate_cap, eps, norm_eps)
    with torch.autocast(q_bthk.device.type, enabled=False):
        h, _ = mlstm_chunkwise(
            *inputs, cu_seqlens=cu_seqlens, initial_state=initial_state, gate_cap=gate_cap, eps=eps, chunk_size=chunk_size
        )
        return mlstm_fused_reference(h, ogate_bthv, norm_weight, norm_eps)


def mlstm_step(
    q_bhk: Tensor,
    k_bhk: Tensor,
    v_bhv: Tensor,
    igate_bh: Tensor,
    fgate_bh: Tensor,
    state: MlstmState,
    *,
    gate_cap: float | None = 15.0,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, MlstmState]:
    """One token of decoding; the state's tensors are overwritten with the state after it.

    q, k (B, H, K), v (B, H, V), gates (B, H) float32 (float64 for float64 inputs); state: contiguous tensors, in the gates' dtype, as
    `MlstmState.empty` and `mlstm(..., return_final_state=True)` make them. The kernels allocate nothing but h. backend as in `mlstm`.

    Returns h (B, H, V) in the inputs' dtype and `state` itself. Raises ValueError naming the argument that is wrong, before anything is
    overwritten. There is no gradient: where one would be recorded it is refused.
    """
    if not isinstance(q_bhk, Tensor) or q_bhk.ndim != 3:
        raise ValueError(f"q must be a tensor of shape (B, H, d_qk), got {getattr(q_bhk, 'shape', type(q_bhk).__name__)}")
    if not isinstance(state, MlstmState) or not all(isinstance(x, Tensor) for x in state):
        raise ValueError(f"state must be an MlstmState of tensors, got {type(state).__name__}: MlstmState.empty(...) makes a new one")
    one = [x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim else x for x in (q_bhk, k_bhk, v_bhv, igate_bh, fgate_bh)]
    _check(*one, None, state, gate_cap, eps, 1, backend, state_name="state")
    for name, x in zip(MlstmState._fields, state, strict=True):
        if not x.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous, because it is overwritten: pass state.{name}.contiguous()")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*one, *state)):
        raise ValueError("mlstm_step has no gradient: call it under torch.no_grad(), or mlstm(..., initial_state=state) for one token")
    if _use_triton(backend, one[0], one[2]):
        from .triton_op import mlstm_step_cell

        return mlstm_step_cell(q_bhk, k_bhk, v_bhv, igate_bh, fgate_bh, state, gate_cap, eps), state
    with torch.no_grad(), torch.autocast(q_bhk.device.type, enabled=False):
        h, new = mlstm_step_reference(q_bhk, k_bhk, v_bhv, igate_bh, fgate_bh, state, gate_cap=gate_cap, eps=eps)
        for x, y in zip(state, new, strict=True):
            x.copy_(y)
    return h, state


def _use_triton(backend: str, q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take this call; for backend "triton" a ValueError if they cannot."""
    if backend == "reference":
        return False
    reason = triton_missing(q.device)
    if reason is None:
        from .triton_op import SHAPES

        if (q.shape[-1], v.shape[-1]) not in SHAPES:
            reason = f"(d_qk, d_v) = {q.shape[-1], v.shape[-1]} has no kernel; there are {', '.join(str(s) for s in SHAPES)}"
        elif q.dtype == torch.float64 or (q.dtype == torch.float32 and q.is_cuda):
            reason = f"the kernels take bfloat16 and float16, not {q.dtype}"
        elif backend == "auto" and q.dtype != torch.bfloat16:
            reason = f"{q.dtype} inputs would be rounded to bfloat16 inside"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot run this mLSTM: {reason}; use 'reference' or 'auto'")
    if backend == "auto":
        log_once(_log, "mLSTM: Triton kernels" if reason is None else f"mLSTM: plain-torch reference ({reason})")
    return reason is None


def _check(q, k, v, igate, fgate, cu_seqlens, initial_state, gate_cap, eps, chunk_size, backend, state_name="initial_state") -> None:
    """Every argument error, before any work."""
    named = {"q": q, "k": k, "v": v, "igate": igate, "fgate": fgate}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"q must have shape (B, T, H, d_qk) with no empty dimension, got {tuple(shape)}")
    batch, length, heads, d_qk = shape
    tokens = shape[:3]
    if k.shape != shape:
        raise ValueError(f"k must have q's shape {tuple(shape)}, got {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != tokens or v.shape[3] == 0:
        raise ValueError(f"v must have shape ({batch}, {length}, {heads}, d_v), got {tuple(v.shape)}")
    if dtype not in _INPUT_DTYPES:
        raise ValueError(f"q has dtype {dtype}; it must be one of {', '.join(str(d) for d in _INPUT_DTYPES)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {dtype}: they must agree")
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name, x in (("igate", igate), ("fgate", fgate)):
        if x.shape != tokens:
            raise ValueError(f"{name} must have shape {tuple(tokens)}, got {tuple(x.shape)}")
        if x.dtype != gate_dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; gates must be {gate_dtype} (compute the gate projection in it)")
    for name, x in named.items():
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} but q is on {device}: move it there")
    check_cu_seqlens(cu_seqlens, batch, length, device)
    if initial_state is not None:
        d_v = v.shape[3]
        expected = {"c_bhkv": (batch, heads, d_qk, d_v), "n_bhk": (batch, heads, d_qk), "m_bh": (batch, heads)}
        for (name, wanted), x in zip(expected.items(), initial_state, strict=True):
            if x.shape != wanted or x.dtype != gate_dtype or x.device != device:
                found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
                raise ValueError(f"{state_name}.{name} must be {wanted} {gate_dtype} on {device}, got {found}")
    if gate_cap is not None and not gate_cap > 0:
        raise ValueError(f"gate_cap must be positive, or None for no cap, got {gate_cap}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
