"""The sliding-window attention kernels as torch operators: `swax::swa`, with shapes for tracing and their gradients.

Importing this module needs Triton; the dispatch in `__init__.py` imports it only for tensors it is meant for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_launch as launch

HEAD_SIZES = tuple(sorted({d for d, _ in launch.CONFIGS}))  # with a tested configuration


@torch.library.custom_op("swax::swa", mutates_args=())
def swa_op(q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, end: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D) and the base-2 log-sum-exp (B, H, T)."""
    return launch.forward(q, k, v, window, start, scale, launch.config_for(q.shape[-1], window))


@swa_op.register_fake
def _(q, k, v, window, start, end, scale):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("swax::swa_backward", mutates_args=())
def swa_backward_op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, window: int, start: Tensor | None, end: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    return launch.backward(q, k, v, o, lse, do, window, start, end, scale, launch.config_for(q.shape[-1], window))


@swa_backward_op.register_fake
def _(q, k, v, o, lse, do, window, start, end, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.window, start, end, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, start, end)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, _):
    q, k, v, o, lse, start, end = ctx.saved_tensors
    return *swa_backward_op(q, k, v, o, lse, do, ctx.window, start, end, ctx.scale), None, None, None, None


swa_op.register_autograd(_differentiate, setup_context=_save)
