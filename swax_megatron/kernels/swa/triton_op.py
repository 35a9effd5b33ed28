"""The sliding-window attention kernels under autograd: as operators `swax::swa*` for tracing, as a Function in eager mode.

Both do the same; a registered operator costs some 0.3 ms of Python a call more, longer than a narrow window's kernels run.

Importing this module needs Triton; the dispatch in `__init__.py` imports it only for tensors it is meant for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch as launch

HEAD_SIZES = tuple(sorted({d for d, _ in launch.CONFIGS}))  # with a tested configuration


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, end: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D) and the base-2 log-sum-exp (B, H, T)."""
    return launch.forward(q, k, v, window, start, scale, launch.config_for(q.shape[-1], window))


def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, window: int, start: Tensor | None, end: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    return launch.backward(q, k, v, o, lse, do, window, start, end, scale, launch.config_for(q.shape[-1], window))


swa_op = torch.library.custom_op("swax::swa", _forward, mutates_args=())
swa_backward_op = torch.library.custom_op("swax::swa_backward", _backward, mutates_args=())


@swa_op.register_fake
def _(q, k, v, window, start, end, scale):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


@swa_backward_op.register_fake
def _(q, k, v, o, lse, do, window, start, end, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.window, start, end, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, start, end)
    ctx.set_materialize_grads(False)


def _differentiate(run, ctx, do):
    q, k, v, o, lse, start, end = ctx.saved_tensors
    return *run(q, k, v, o, lse, do, ctx.window, start, end, ctx.scale), None, None, None, None


swa_op.register_autograd(lambda ctx, do, _: _differentiate(swa_backward_op, ctx, do), setup_context=_save)


class _Swa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return _differentiate(_backward, ctx, do)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, end: Tensor | None, scale: float) -> Tensor:
    """o (B, T, H, D), differentiable. start, end: (B, T) int32 bounds of each token's document, or None."""
    if torch.compiler.is_compiling():
        return swa_op(q, k, v, window, start, end, scale)[0]
    return _Swa.apply(q, k, v, window, start, end, scale)
