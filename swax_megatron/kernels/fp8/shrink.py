"""Matrices in 8 bits, as they are and turned, with the float32 factor that brings them back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_BLOCK, _TILE, _WARPS = 8192, 128, 8
_MOST = 4  # matrices side by side that share a launch
Small = tuple[Tensor, Tensor, Tensor]  # (r, c), turned (c, r), scale (1,)


class _Slots:
    """Zeros for maxima and room for factors, 16 bytes each, made many at a time: a launch each would cost as much as the work."""

    def __init__(self) -> None:
        self._pool: Tensor | None = None
        self._next = 0

    def take(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._pool is None or self._next == self._pool.shape[1] or self._pool.device != device:
            self._pool, self._next = torch.zeros(2, 1024, 4, device=device), 0
        at, self._next = self._next, self._next + 1
        return self._pool[0, at, :1], self._pool[1, at, :1]


_slots = _Slots()


@functools.cache
def _limit(kind: torch.dtype) -> float:
    return torch.finfo(kind).max


@functools.cache
def _kind(kind: torch.dtype):
    import triton.language as tl

    return {FORWARD: tl.float8e4nv, BACKWARD: tl.float8e5, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[kind]


def shrink(pieces: Sequence[Tensor], kind: torch.dtype) -> Small:
    """Up to four dense matrices (r, c_1), (r, c_2) ... side by side with one scale for all; sizes are multiples of 16."""
    import triton

    from ..launching import launch
    from . import triton_kernels as kernels

    pieces = [piece.contiguous() for piece in pieces]
    rows, widths, count = pieces[0].shape[0], [piece.shape[1] for piece in pieces], len(pieces)
    assert count <= _MOST and rows % 16 == 0 and all(width % 16 == 0 for width in widths), (rows, widths)
    device, columns = pieces[0].device, sum(widths)
    largest, inverse = _slots.take(device)
    plain, turned = torch.empty(rows, columns, device=device, dtype=kind), torch.empty(columns, rows, device=device, dtype=kind)
    four, wide = [*pieces, *[pieces[0]] * (_MOST - count)], [*widths, *[0] * (_MOST - count)]
    grid, numbers = (triton.cdiv(rows * max(widths), _BLOCK), count), (rows, *wide)
    launch(kernels.largest, grid, (*four, largest), numbers, {"PIECES": count, "BLOCK": _BLOCK, "num_warps": _WARPS}, numbers)
    even = rows % _TILE == 0 and all(width % _TILE == 0 for width in widths)
    grid, tensors = (triton.cdiv(rows, _TILE), triton.cdiv(max(widths), _TILE), count), (*four, largest, plain, turned, inverse)
    constants = {"PIECES": count, "LIMIT": _limit(kind), "TURNED": True, "KIND": _kind(kind), "EVEN": even, "BR": _TILE, "BC": _TILE}
    launch(kernels.scaled, grid, tensors, (*numbers, columns, rows), {**constants, "num_warps": _WARPS}, numbers)
    return plain, turned, inverse


class Weights:
    """The weights of projections of one input in 8 bits, one above the other, kept while they do not change.

    All holders in a process bring theirs to 8 bits together, in two launches, when one of them is first asked after a change.
    """

    generation = 0  # of all weights in this process
    _holders: weakref.WeakSet[Weights] = weakref.WeakSet()
    _together: _Together | None = None

    def __init__(self) -> None:
        self._made = -1
        self._weights: list[Tensor] = []
        self._small: Small | None = None

    @classmethod
    def changed(cls) -> None:
        """Weights may have changed: they are brought to 8 bits again when next used."""
        cls.generation += 1

    def small(self, weights: Sequence[Tensor]) -> Small:
        if self._made != Weights.generation:
            if self not in Weights._holders:
                self._weights = list(weights)
                Weights._holders.add(self)
            stale = [holder for holder in Weights._holders if holder._made != Weights.generation]
            addresses = [weight.data_ptr() for holder in stale for weight in holder._weights]
            if Weights._together is None or Weights._together.addresses != addresses:
                Weights._together = _Together(stale, addresses)
            Weights._together.run()
            for holder in stale:
                holder._made = Weights.generation
        return self._small


class _Together:
    """Tables over the weights of many holders, and the memory that their small forms live in."""

    def __init__(self, holders: list[Weights], addresses: list[int]) -> None:
        self.addresses = addresses
        device, self._kind = holders[0]._weights[0].device, holders[0]._weights[0].dtype
        self._scales = torch.zeros(2, len(holders), 4, device=device)
        rows, blocks, tiles = [], [], []
        for slot, holder in enumerate(holders):
            heights, width = [weight.shape[0] for weight in holder._weights], holder._weights[0].shape[1]
            total = sum(heights)
            assert width % 16 == 0 and all(height % 16 == 0 for height in heights), (heights, width)
            plain, turned = torch.empty(total, width, device=device, dtype=FORWARD), torch.empty(width, total, device=device, dtype=FORWARD)
            holder._small = plain, turned, self._scales[1, slot, :1]
            done = 0
            for weight in holder._weights:
                assert weight.is_contiguous() and weight.data_ptr() % 16 == 0, "weights in 8 bits are read in groups of 16 bytes"
                place = len(rows)
                rows.append([weight.data_ptr(), *weight.shape, slot, plain[done:].data_ptr(), turned[:, done:].data_ptr(), total])
                blocks.append(_grid(place, -(-weight.numel() // _BLOCK)))
                tiles.append(_grid(place, -(-weight.shape[0] // _TILE), -(-width // _TILE)))
                done += weight.shape[0]
        self._even = all(height % _TILE == 0 and width % _TILE == 0 for _, height, width, *_ in rows)
        self._table = torch.tensor(rows).to(device)
        self._blocks, self._tiles = (torch.cat(each).int().contiguous().to(device) for each in (blocks, tiles))

    def run(self) -> None:
        from . import triton_kernels as kernels

        self._scales[0].zero_()
        kernels.largest_of_weights[(len(self._blocks),)](
            self._table, self._blocks, self._scales[0], KIND=_kind(self._kind), BLOCK=_BLOCK, num_warps=_WARPS
        )  # fmt: skip
        kernels.scaled_weights[(len(self._tiles),)](
            self._table, self._tiles, self._scales[0], self._scales[1],
            LIMIT=torch.finfo(FORWARD).max, KIND=_kind(self._kind), SMALL=_kind(FORWARD), EVEN=self._even, BR=_TILE, BC=_TILE,
            num_warps=_WARPS,
        )  # fmt: skip


def _grid(place: int, *counts: int) -> Tensor:
    """(programs, 1 + dimensions): the weight's place, then every combination of counts."""
    axes = torch.meshgrid(*(torch.arange(count) for count in counts), indexing="ij")
    parts = [axis.flatten() for axis in axes]
    return torch.stack([torch.full_like(parts[0], place), *parts], 1)
