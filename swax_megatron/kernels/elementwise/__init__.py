"""What lies between matrix products and is bound by memory: SwiGLU's activation, rotary positions, the mLSTM's two scalar gates.

Entry points over a plain-torch reference and Triton kernels that read and write every tensor once, forward and backward.
Legend: b batch, t time, h query heads, g key heads, d head size; r rows (tokens), x hidden size, n gates (heads) of one kind.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..documents import log_once, triton_missing
from .reference import gate_projections_reference, rotary_reference, swiglu_reference

__all__ = ["gate_projections", "rotary", "swiglu", "uses_triton"]

_log = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up (Shazeer 2020), of any one shape; the result in their dtype.

    The kernels compute in float32, round once and keep gate and up alone for the backward pass. backend: "reference", "triton" (an
    error where it cannot), or "auto": Triton for bfloat16 on a tested GPU, else the reference, said once in the log.
    Raises ValueError naming the argument that is wrong.
    """
    _check_tensors(gate=gate, up=up)
    if up.shape != gate.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if not uses_triton(gate, backend):
        return swiglu_reference(gate, up)
    from .triton_op import swiglu_cell

    return swiglu_cell(gate, up)


def rotary(q_bthd: Tensor, k_btgd: Tensor, positions_bt: Tensor, base: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """q and k turned by their positions (RoPE, Su et al. 2021), rotate-half: channel i of the first half against channel i of the second.

    q (B, T, H, D), k (B, T, G, D), D even, any strides; positions (B, T) int64: of each token in its document. Angles are
    positions * base^(-2i / D) in float32, products in float32, results in q's dtype. backend as in `swiglu`.
    Raises ValueError naming the argument that is wrong.
    """
    _check_tensors(q=q_bthd, k=k_btgd)
    if q_bthd.ndim != 4 or q_bthd.shape[3] % 2:
        raise ValueError(f"q must have shape (B, T, H, D) with an even D, got {tuple(q_bthd.shape)}")
    batch, length, _, d = q_bthd.shape
    if k_btgd.ndim != 4 or k_btgd.shape[:2] != q_bthd.shape[:2] or k_btgd.shape[3] != d:
        raise ValueError(f"k must have shape ({batch}, {length}, kv_heads, {d}), got {tuple(k_btgd.shape)}")
    if positions_bt.shape != (batch, length) or positions_bt.dtype != torch.int64 or positions_bt.device != q_bthd.device:
        found = f"{tuple(positions_bt.shape)} {positions_bt.dtype} on {positions_bt.device}"
        raise ValueError(f"positions must be ({batch}, {length}) int64 on {q_bthd.device}, got {found}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    if not uses_triton(q_bthd, backend):
        return rotary_reference(q_bthd, k_btgd, positions_bt, base)
    from .triton_op import rotary_cell

    return rotary_cell(q_bthd, k_btgd, positions_bt, float(base))


def gate_projections(
    x: Tensor, igate_weight: Tensor, igate_bias: Tensor, fgate_weight: Tensor, fgate_bias: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x Wᵀ + b for the mLSTM's input and forget gates: x (..., X), weights (N, X), biases (N,) -> two (..., N) in float32.

    Products and sums are float32 whatever the types (float64 for float64 inputs): bfloat16 would move log f by up to 3 percent. The
    kernels read x as it is, once for both gates; the weights' gradients are summed in a fixed order. backend as in `swiglu`.
    Raises ValueError naming the argument that is wrong.
    """
    _check_tensors(x=x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (..., hidden) with at least two dimensions, got {tuple(x.shape)}")
    width = x.shape[-1]
    if igate_weight.ndim != 2 or igate_weight.shape[1] != width or igate_weight.shape[0] == 0:
        raise ValueError(f"igate_weight must have shape (heads, {width}), got {tuple(igate_weight.shape)}")
    heads = igate_weight.shape[0]
    named = {"igate_weight": (igate_weight, (heads, width)), "igate_bias": (igate_bias, (heads,))}
    named |= {"fgate_weight": (fgate_weight, (heads, width)), "fgate_bias": (fgate_bias, (heads,))}
    for name, (tensor, shape) in named.items():
        if tensor.shape != shape or tensor.device != x.device or tensor.dtype not in _DTYPES:
            found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be a floating-point tensor of shape {shape} on {x.device}, got {found}")
        if tensor.dtype == torch.float64 and x.dtype != torch.float64:
            raise ValueError(f"{name} is float64 but x is {x.dtype}: they must agree there")
    if not uses_triton(x, backend):
        return gate_projections_reference(x, igate_weight, igate_bias, fgate_weight, fgate_bias)
    from .triton_op import gate_projections_cell

    return gate_projections_cell(x, igate_weight, igate_bias, fgate_weight, fgate_bias)


def uses_triton(x: Tensor, backend: str) -> bool:
    """Whether the kernels of this module take a call with x; for backend "triton" a ValueError if they cannot."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
    if backend == "reference":
        return False
    reason = triton_missing(x.device)
    if reason is None and x.dtype not in _KERNEL_DTYPES:
        reason = f"the kernels do not take {x.dtype}"
    elif reason is None and backend == "auto" and x.dtype != torch.bfloat16:
        reason = f"the kernels are meant for bfloat16, not {x.dtype}"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot run SwiGLU, rotary positions and gates: {reason}; use 'reference' or 'auto'")
    if backend == "auto":
        name = "SwiGLU, rotary positions and gates"
        log_once(_log, f"{name}: Triton kernels" if reason is None else f"{name}: plain torch ({reason})")
    return reason is None


def _check_tensors(**named: Tensor) -> None:
    """Tensors with elements, of one dtype and one device."""
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.ndim == 0 or 0 in x.shape:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor with no empty dimension, got {found}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be one of {', '.join(str(d) for d in _DTYPES)}")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but {first_name} is {first.dtype} on {first.device}: they must agree")
