"""Matrix products in 8 bits (Micikevicius et al. 2022): one scale a tensor from its largest magnitude, forward e4m3, gradients e5m2.

The products are torch's own (cuBLAS), with float32 sums. They want both factors with the summed dimension last, so that every
matrix is written twice, as it is and turned; its bf16 form is not kept for the backward pass.
Legend: r rows, c columns; n tokens, i inputs, o outputs of all the projections together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_BLOCK, _TILE = 16384, 128


class Small(NamedTuple):
    """A matrix in 8 bits: (r, c) and turned (c, r), either of which may be left out, and the float32 factor that brings it back."""

    plain: Tensor | None
    turned: Tensor | None
    scale: Tensor


def missing(device: torch.device) -> str | None:
    """Why products in 8 bits cannot run on ``device``; None if they can."""
    if device.type != "cuda":
        return f"there are none on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else f"compute capability {capability} is untested, only (9, 0) was tested"


def shrink(pieces: Sequence[Tensor], kind: torch.dtype, *, across: bool = True, plain: bool = True, turned: bool = True) -> Small:
    """Matrices of one type with one scale for all, side by side.

    across: (r, c_1), (r, c_2) ... -> (r, c_1 + c_2 ...), else (r_1, c), (r_2, c) ... -> (r_1 + r_2 ..., c)
    """
    import triton
    import triton.language as tl

    from . import triton_kernels as kernels

    pieces = [piece.contiguous() for piece in pieces]
    device = pieces[0].device
    largest, inverse = torch.zeros(1, device=device), torch.empty(1, device=device)
    for piece in pieces:
        kernels.largest[(triton.cdiv(piece.numel(), _BLOCK),)](piece, largest, piece.numel(), BLOCK=_BLOCK, num_warps=8)
    long, wide = pieces[0].shape
    rows, columns = (long, sum(p.shape[1] for p in pieces)) if across else (sum(p.shape[0] for p in pieces), wide)
    as_is = torch.empty(rows, columns, device=device, dtype=kind) if plain else None
    other = torch.empty(columns, rows, device=device, dtype=kind) if turned else None
    done = 0
    for piece in pieces:
        at = (slice(None), slice(done, done + piece.shape[1])) if across else (slice(done, done + piece.shape[0]), slice(None))
        here = as_is[at] if plain else piece
        there = other[at[::-1]] if turned else piece
        kernels.scaled[(triton.cdiv(piece.shape[0], _TILE), triton.cdiv(piece.shape[1], _TILE))](
            piece, largest, here, there, inverse, piece.shape[0], columns, rows,
            COLUMNS=piece.shape[1], LIMIT=torch.finfo(kind).max, PLAIN=plain, TURNED=turned,
            KIND=tl.float8e4nv if kind is FORWARD else tl.float8e5, BR=_TILE, BC=_TILE, num_warps=8,
        )  # fmt: skip
        done += piece.shape[1] if across else piece.shape[0]
    return Small(as_is, other, inverse)


def product(a_rk: Tensor, b_ck: Tensor, scale_a: Tensor, scale_b: Tensor, *, fast: bool) -> Tensor:
    """a bᵀ in bf16. fast: partial sums stay in the tensor cores' own precision throughout, else they go to float32 every few terms."""
    return torch._scaled_mm(a_rk, b_ck.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


class Weights:
    """The weights of projections of one input in 8 bits, kept while they do not change."""

    generation = 0  # of all weights in this process

    def __init__(self) -> None:
        self._known: tuple[int, Small] | None = None

    @classmethod
    def changed(cls) -> None:
        """Weights may have changed: they are brought to 8 bits again when next used."""
        cls.generation += 1

    def small(self, weights: Sequence[Tensor]) -> Small:
        if self._known is None or self._known[0] != Weights.generation:
            self._known = Weights.generation, shrink([weight.detach() for weight in weights], FORWARD, across=False)
        return self._known[1]


class Products(torch.autograd.Function):
    """x (..., i), the weights' holder, weights (o_1, i), (o_2, i) ... -> (..., o_1), (..., o_2) ..."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, holder: Weights, *weights: Tensor) -> tuple[Tensor, ...]:
        small_x = shrink([x.reshape(-1, x.shape[-1])], FORWARD, turned=x.requires_grad or any(w.requires_grad for w in weights))
        small_w = holder.small(weights)
        sizes = [weight.shape[0] for weight in weights]
        ctx.save_for_backward(small_x.turned, small_x.scale, small_w.turned, small_w.scale)
        ctx.sizes, ctx.shape = sizes, x.shape
        parts = small_w.plain.split(sizes)
        return tuple(product(small_x.plain, part, small_x.scale, small_w.scale, fast=True).view(*x.shape[:-1], -1) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_in, scale_x, w_io, scale_w = ctx.saved_tensors
        small = shrink([dy.reshape(-1, dy.shape[-1]) for dy in gradients], BACKWARD)
        dx = product(small.plain, w_io, small.scale, scale_w, fast=FAST_BACKWARD)
        d_weights = product(small.turned, x_in, small.scale, scale_x, fast=FAST_BACKWARD)
        return dx.view(ctx.shape), None, *d_weights.split(ctx.sizes)


FAST_BACKWARD = False
