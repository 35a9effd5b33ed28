"""Best-fit packing of documents into rows: no document that fits a row is cut.

The documents of a block are laid into rows of T + 1 ids, longest first, each into the row with the least room that still holds it
(best-fit decreasing; Johnson 1974; for language models Ding et al. 2024, arXiv:2404.10830). A document of more than T + 1 ids is cut with
stride T, like a concatenated line: full pieces of T + 1 ids, each a row of its own, and a rest that is packed like a document. So
every id but a document's first is a target exactly once. A document of a single id (an EOS) has no target and is left out.

How many rows a block needs depends on its multiset of lengths alone, not on their order. That is what makes the packing
random-access: rows are counted once for a data set, whatever the seed and the epoch, while each epoch's own order of the
documents decides which of equally long ones share a row, and in which order they stand in it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """The rows of a block. Row r holds the pieces ``starts[r] : starts[r + 1]``, in this order.

    document (P,): number of the document in the block.  skip (P,): ids of it before the piece.  length (P,): ids of the piece.
    """

    document: np.ndarray
    skip: np.ndarray
    length: np.ndarray
    starts: np.ndarray


def _steps(sizes: list[int], counts: list[int], capacity: int) -> Iterator[tuple[int, int, int, int, bool]]:
    """Best-fit decreasing, equal pieces and equally filled rows taken together.

    sizes: different, descending.  counts: pieces of each size.
    Yields (room, rows, each, rest, new): ``rows`` rows with that much room (new ones, or those filled to it before) each take
    ``each`` pieces of the current size, the last of them ``rest``.
    """
    rooms: list[int] = []  # the different amounts of room of the open rows, ascending
    rows_with: dict[int, int] = {}

    def put(room: int, rows: int) -> None:
        if room and rows:
            if room not in rows_with:
                insort(rooms, room)
            rows_with[room] = rows_with.get(room, 0) + rows

    for size, count in zip(sizes, counts, strict=True):
        while count:
            at = bisect_left(rooms, size)
            new = at == len(rooms)
            room = capacity if new else rooms[at]
            each = room // size
            rows = -(-count // each)
            if not new and rows >= rows_with[room]:
                rows = rows_with.pop(room)
                del rooms[at]
            elif not new:
                rows_with[room] -= rows
            placed = min(count, rows * each)
            rest = placed - (rows - 1) * each
            put(room - each * size, rows - 1)
            put(room - rest * size, 1)
            count -= placed
            yield room, rows, each, rest, new


def _pieces(lengths: np.ndarray, row_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each document: full pieces of ``row_targets`` + 1 ids, and the ids of the rest (0: none)."""
    full, rest = np.divmod(lengths - 1, row_targets)
    return full, np.where(rest > 0, rest + 1, 0)


def count_rows(lengths: np.ndarray, row_targets: int) -> int:
    """The rows that ``pack_block`` makes of documents of these lengths in ids: (D,), in any order."""
    full, rest = _pieces(np.asarray(lengths, np.int64), row_targets)
    sizes, counts = np.unique(rest[rest > 0], return_counts=True)
    steps = _steps(sizes[::-1].tolist(), counts[::-1].tolist(), row_targets + 1)
    return int(full.sum()) + sum(rows for _, rows, _, _, new in steps if new)


def pack_block(lengths: np.ndarray, row_targets: int) -> Packed:
    """Lay documents of ``lengths`` ids (D,), in the epoch's order, into rows of ``row_targets`` + 1 ids."""
    lengths = np.asarray(lengths, np.int64)
    full, rest = _pieces(lengths, row_targets)
    whole = np.repeat(np.arange(len(lengths)), full)
    nth = np.arange(len(whole)) - np.repeat(np.cumsum(full) - full, full)
    packed = np.flatnonzero(rest)
    packed = packed[np.argsort(-rest[packed], kind="stable")]
    rows = _assign(rest[packed], row_targets + 1)
    order = np.lexsort((packed, rows))  # within a row, the epoch's order again: short documents do not always stand last
    packed, rows = packed[order], rows[order] + len(whole)
    row_count = int(rows[-1]) + 1 if len(rows) else len(whole)
    return Packed(
        document=np.concatenate([whole, packed]),
        skip=np.concatenate([nth, full[packed]]) * row_targets,
        length=np.concatenate([np.full(len(whole), row_targets + 1), rest[packed]]),
        starts=np.searchsorted(np.concatenate([np.arange(len(whole)), rows]), np.arange(row_count + 1)),
    )


def _assign(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, of descending ``sizes``."""
    distinct, counts = np.unique(sizes, return_counts=True)
    with_room: dict[int, list[int]] = {}
    rows_of: list[int] = []
    made = left = size = 0
    remaining = iter(zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True))
    for room, rows, each, rest, new in _steps(distinct[::-1].tolist(), counts[::-1].tolist(), capacity):
        if not left:
            size, left = next(remaining)
        if new:
            taken = list(range(made, made + rows))
            made += rows
        else:
            taken = with_room[room][-rows:]
            del with_room[room][-rows:]
        last = taken.pop()
        for row in taken:
            rows_of += [row] * each
        rows_of += [last] * rest
        left -= (rows - 1) * each + rest
        if taken:
            with_room.setdefault(room - each * size, []).extend(taken)
        with_room.setdefault(room - rest * size, []).append(last)
    return np.array(rows_of, np.int64)
