"""Geometry of checkpoints: boxes of a global tensor, no tensors and no files.

A box is an axis-aligned block of a row-major tensor: ``offsets`` and ``sizes``, one entry a dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A block of a tensor.

    ``flat_start`` is set by :func:`flat_range_boxes` alone: the index, in the flattened tensor, of the block's first
    element; the block is then the contiguous run ``flat[flat_start : flat_start + volume].view(sizes)``.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    flat_start: int | None = None

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """First index past the block, per dimension."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def shifted(self, by: Sequence[int]) -> Box:
        """The same block seen from a tensor in which this one's origin lies at ``by`` (a tensor-parallel shard's offsets)."""
        return Box(tuple(offset + shift for offset, shift in zip(self.offsets, by, strict=True)), self.sizes, self.flat_start)

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Index expression of this block in a tensor whose own first element lies at ``origin`` (default: zero)."""
        start = origin if origin is not None else (0,) * len(self.offsets)
        return tuple(slice(a - o, a - o + n) for a, n, o in zip(self.offsets, self.sizes, start, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.offsets, self.ends, strict=True)) + "]"


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements ``[start, stop)`` of a flattened row-major 1-D or 2-D tensor as at most three boxes, in order.

    A range of a matrix is the tail of a row, whole rows, and the head of a row. An empty range gives no box.
    Raises ValueError for other ranks and for a range outside the tensor.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"a flat range needs a 1-D or 2-D tensor, not shape {shape}: reshape it first")
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"flat range [{start}, {stop}) lies outside a tensor of shape {shape}")
    if start == stop:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,), start)]
    width = shape[1]
    boxes: list[Box] = []
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            size = min(width - column, stop - start)
            boxes.append(Box((row, column), (1, size), start))
        else:
            rows = (stop - start) // width
            size = rows * width
            boxes.append(Box((row, 0), (rows, width), start))
        start += size
    return boxes


def intersect(a: Box, b: Box) -> Box | None:
    """The common block of two boxes of one tensor, or None where they share no element."""
    offsets = tuple(max(x, y) for x, y in zip(a.offsets, b.offsets, strict=True))
    sizes = tuple(min(x, y) - o for x, y, o in zip(a.ends, b.ends, offsets, strict=True))
    return None if any(size <= 0 for size in sizes) else Box(offsets, sizes)


def subtract(a: Box, b: Box) -> list[Box]:
    """What remains of ``a`` without ``b``, as disjoint boxes."""
    common = intersect(a, b)
    if common is None:
        return [a]
    remains: list[Box] = []
    offsets, sizes = list(a.offsets), list(a.sizes)
    for dim, (low, high, end) in enumerate(zip(common.offsets, common.ends, a.ends, strict=True)):
        # Cut off what lies before and after the common part in this dimension; go on inside it.
        for start, stop in ((a.offsets[dim], low), (high, end)):
            if start < stop:
                piece_offsets, piece_sizes = offsets.copy(), sizes.copy()
                piece_offsets[dim], piece_sizes[dim] = start, stop - start
                remains.append(Box(tuple(piece_offsets), tuple(piece_sizes)))
        offsets[dim], sizes[dim] = low, high - low
    return remains


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Indices of two boxes that share an element, or None. A sweep along the dimension with the most distinct offsets."""
    if len(boxes) < 2:
        return None
    dims = len(boxes[0].offsets)
    if dims == 0:
        return (0, 1)
    axis = max(range(dims), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    active: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: boxes[i].offsets[axis]):
        box = boxes[index]
        active = [other for other in active if boxes[other].ends[axis] > box.offsets[axis]]
        for other in active:
            if intersect(box, boxes[other]) is not None:
                return (other, index)
        active.append(index)
    return None


def tiling_error(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """None where the boxes hold every element of ``shape`` exactly once; else what is wrong, naming the blocks."""
    shape = tuple(shape)
    whole = Box((0,) * len(shape), shape)
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return f"chunk {box.offsets}+{box.sizes} has not the {len(shape)} dimensions of shape {shape}"
        if min((*box.offsets, *box.sizes), default=0) < 0 or any(end > size for end, size in zip(box.ends, shape, strict=True)):
            return f"chunk {box} lies outside shape {shape}"
    boxes = [box for box in boxes if box.volume]
    overlap = find_overlap(boxes)
    if overlap is not None:
        return f"chunks {boxes[overlap[0]]} and {boxes[overlap[1]]} of shape {shape} overlap"
    if sum(box.volume for box in boxes) == whole.volume:
        return None
    holes = [whole]
    for box in boxes:
        holes = [piece for hole in holes for piece in subtract(hole, box)]
    missing = sum(hole.volume for hole in holes)
    return f"no chunk holds {holes[0]} of shape {shape} ({missing} of {whole.volume} elements are missing)"
