"""AdamW over all parameters of a model in one launch: gradients, masters and moments are read once, the model's weights written with them.

Needs Triton; the definition is torch's AdamW (Loshchilov and Hutter 2019) followed by a copy of the masters into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 8  # elements and warps of a program


@triton.jit
def _pointer(table_ptr, column, COLUMNS: tl.constexpr, tensor, at, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Where element ``at`` of a tensor lies, by the table of addresses."""
    start = tl.load(table_ptr + tensor * COLUMNS + column).to(tl.pointer_type(KIND))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + at


@triton.jit
def adamw(
    table_ptr, grads_ptr, blocks_ptr, lr, beta1, beta2, eps, correction1, correction2, scale,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of one tensor. table: (tensors, 6) master, moments, weight, size, 1e9 * decay; grads: (tensors, 2) address, is it float32;
    blocks: (programs, 2) tensor, block of it.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor, block = tl.load(blocks_ptr + 2 * program).to(tl.int64), tl.load(blocks_ptr + 2 * program + 1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    left = tl.minimum(tl.load(table_ptr + tensor * 6 + 4) - block * BLOCK, BLOCK).to(tl.int32)
    if ALIGNED:  # said in groups of 16, which are then read and written whole
        real = lane // 16 < left // 16
    else:
        real = lane < left
    decay = tl.load(table_ptr + tensor * 6 + 5).to(tl.float32) * 1e-9
    master_at = _pointer(table_ptr, 0, 6, tensor, at, tl.float32, ALIGNED)
    mean_at = _pointer(table_ptr, 1, 6, tensor, at, tl.float32, ALIGNED)
    square_at = _pointer(table_ptr, 2, 6, tensor, at, tl.float32, ALIGNED)
    if tl.load(grads_ptr + tensor * 2 + 1) == 1:
        gradient = tl.load(_pointer(grads_ptr, 0, 2, tensor, at, tl.float32, ALIGNED), mask=real, other=0.0)
    else:
        gradient = tl.load(_pointer(grads_ptr, 0, 2, tensor, at, WEIGHT, ALIGNED), mask=real, other=0.0).to(tl.float32)
    gradient *= scale
    master = tl.load(master_at, mask=real, other=0.0)
    mean = tl.load(mean_at, mask=real, other=0.0)
    square = tl.load(square_at, mask=real, other=0.0)
    master -= lr * decay * master
    mean += (1.0 - beta1) * (gradient - mean)
    square = beta2 * square + (1.0 - beta2) * gradient * gradient
    master -= lr / correction1 * mean / (tl.sqrt(square) / tl.sqrt(correction2) + eps)
    tl.store(master_at, master, mask=real)
    tl.store(mean_at, mean, mask=real)
    tl.store(square_at, square, mask=real)
    tl.store(_pointer(table_ptr, 3, 6, tensor, at, WEIGHT, ALIGNED), master.to(WEIGHT), mask=real)


class AdamW:
    """The update of tensors that stay where they are; only gradients move."""

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], decays: Sequence[float]) -> None:
        """pieces: fp32 master, both moments (flat) and weight (any shape) of every parameter, all dense; decays: its weight decay."""
        aligned = [piece[0].numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in piece) for piece in pieces]
        parts = [[i for i, kind in enumerate(aligned) if kind is wanted] for wanted in (True, False)]
        self._launches = [
            (part, _Launch([pieces[i] for i in part], [decays[i] for i in part], aligned[part[0]])) for part in parts if part
        ]

    def ready(self, gradients: Sequence[Tensor]) -> None:
        """Say where the gradients of every parameter lie: float32 or the weights' type, dense. They must live on till the update."""
        for part, launch in self._launches:
            launch.ready([gradients[i] for i in part])

    def forget(self) -> None:
        """Let go of the gradients."""
        for _, launch in self._launches:
            launch.forget()

    def __call__(self, lr: float, betas: tuple[float, float], eps: float, updates: int, scale: float) -> None:
        """updates: the number of this one, from 1; scale: what gradients are multiplied by."""
        corrections = 1.0 - betas[0] ** updates, 1.0 - betas[1] ** updates
        for _, launch in self._launches:
            launch(float(lr), *betas, eps, *corrections, float(scale))


class _Launch:
    """Tensors that one launch updates. aligned: they begin at multiples of 16 bytes and hold multiples of 16 elements."""

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], decays: Sequence[float], aligned: bool) -> None:
        device = pieces[0][0].device
        assert all(tensor.is_contiguous() for piece in pieces for tensor in piece), "strided tensors cannot be updated in place"
        assert len({piece[3].dtype for piece in pieces}) == 1, "one launch writes weights of one type"
        self._kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[pieces[0][3].dtype]
        self._held, self._aligned = list(pieces), aligned  # their addresses stand in the table
        rows = [
            [*(tensor.data_ptr() for tensor in piece), piece[0].numel(), round(decay * 1e9)]
            for piece, decay in zip(pieces, decays, strict=True)
        ]
        counts = torch.tensor([triton.cdiv(row[4], BLOCK) for row in rows])
        tensors = torch.repeat_interleave(torch.arange(len(rows)), counts)
        begins = (counts.cumsum(0) - counts)[tensors]
        blocks = torch.stack([tensors, torch.arange(len(tensors)) - begins], 1).int()
        self._table, self._blocks = torch.tensor(rows).to(device), blocks.contiguous().to(device)

    def ready(self, gradients: Sequence[Tensor]) -> None:
        if self._aligned:
            gradients = [gradient if gradient.data_ptr() % 16 == 0 else gradient.clone() for gradient in gradients]
        moved = torch.tensor([[gradient.data_ptr(), int(gradient.dtype == torch.float32)] for gradient in gradients])
        if self._table.is_cuda:
            moved = moved.pin_memory().to(self._table.device, non_blocking=True)
        self._gradients, self._moved = gradients, moved

    def __call__(self, *numbers: float) -> None:
        adamw[(len(self._blocks),)](
            self._table, self._moved, self._blocks, *numbers, WEIGHT=self._kind, BLOCK=BLOCK, ALIGNED=self._aligned, num_warps=WARPS
        )  # fmt: skip

    def forget(self) -> None:
        self._gradients = self._moved = None
