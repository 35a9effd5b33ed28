"""The kernels under autograd: as operators `swax::*` for tracing, as Functions in eager mode, which cost less Python a call.

Importing this module needs Triton; the dispatch in `__init__.py` imports it only for tensors it is meant for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch as launch


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return launch.swiglu_forward(gate, up)


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return launch.swiglu_backward(dy, gate, up)


swiglu_op = torch.library.custom_op("swax::swiglu", _swiglu, mutates_args=())
swiglu_backward_op = torch.library.custom_op("swax::swiglu_backward", _swiglu_backward, mutates_args=())


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@swiglu_backward_op.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_swiglu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


swiglu_op.register_autograd(lambda ctx, dy: swiglu_backward_op(dy, *ctx.saved_tensors), setup_context=_save_swiglu)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _swiglu_backward(dy, *ctx.saved_tensors)


def swiglu_cell(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable."""
    return swiglu_op(gate, up) if torch.compiler.is_compiling() else _Swiglu.apply(gate, up)


def _rotary(q: Tensor, k: Tensor, positions: Tensor, base: float, back: bool) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions, or (back) by minus them: the gradient of the one is the other."""
    return launch.rotary(q, k, positions, base, back)


rotary_op = torch.library.custom_op("swax::rotary", _rotary, mutates_args=())


@rotary_op.register_fake
def _(q, k, positions, base, back):
    return torch.empty_like(launch.rows(q)), torch.empty_like(launch.rows(k))


def _save_rotary(ctx, inputs, output) -> None:
    _, _, positions, ctx.base, ctx.back = inputs
    ctx.save_for_backward(positions)


def _differentiate_rotary(run, ctx, dq, dk):
    return *run(dq, dk, *ctx.saved_tensors, ctx.base, not ctx.back), None, None, None


rotary_op.register_autograd(lambda ctx, dq, dk: _differentiate_rotary(rotary_op, ctx, dq, dk), setup_context=_save_rotary)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _save_rotary(ctx, inputs, None)
        return _rotary(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return _differentiate_rotary(_rotary, ctx, dq, dk)


def rotary_cell(q: Tensor, k: Tensor, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """q and k turned, differentiable."""
    run = rotary_op if torch.compiler.is_compiling() else _Rotary.apply
    return run(q, k, positions, base, False)


def _gates(x: Tensor, wi: Tensor, bi: Tensor, wf: Tensor, bf: Tensor) -> tuple[Tensor, Tensor]:
    return launch.gates_forward(x, wi, bi, wf, bf)


def _gates_backward(di: Tensor, df: Tensor, x: Tensor, wi: Tensor, wf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return launch.gates_backward(di, df, x, wi, wf)


gates_op = torch.library.custom_op("swax::gates", _gates, mutates_args=())
gates_backward_op = torch.library.custom_op("swax::gates_backward", _gates_backward, mutates_args=())


@gates_op.register_fake
def _(x, wi, bi, wf, bf):
    i, f = (x.new_empty(*x.shape[:-1], wi.shape[0], dtype=torch.float32) for _ in range(2))
    return i, f


@gates_backward_op.register_fake
def _(di, df, x, wi, wf):
    return x.new_empty(x.shape), wi.new_empty(wi.shape, dtype=torch.float32), wf.new_empty(wf.shape, dtype=torch.float32)


def _save_gates(ctx, inputs, output) -> None:
    x, wi, bi, wf, bf = inputs
    ctx.save_for_backward(x, wi, wf)
    ctx.bias_dtypes = bi.dtype, bf.dtype


def _differentiate_gates(run, ctx, di, df):
    x, wi, wf = ctx.saved_tensors
    dx, dwi, dwf = run(di, df, x, wi, wf)
    dbi, dbf = (d.flatten(0, -2).sum(0).to(dtype) for d, dtype in zip((di, df), ctx.bias_dtypes, strict=True))
    return dx, dwi.to(wi.dtype), dbi, dwf.to(wf.dtype), dbf


gates_op.register_autograd(lambda ctx, di, df: _differentiate_gates(gates_backward_op, ctx, di, df), setup_context=_save_gates)


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _save_gates(ctx, inputs, None)
        return _gates(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, di, df):
        return _differentiate_gates(_gates_backward, ctx, di, df)


def gate_projections_cell(x: Tensor, wi: Tensor, bi: Tensor, wf: Tensor, bf: Tensor) -> tuple[Tensor, Tensor]:
    """i~ and f~, differentiable."""
    run = gates_op if torch.compiler.is_compiling() else _Gates.apply
    return run(x, wi, bi, wf, bf)
