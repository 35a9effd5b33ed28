"""The order of a data set in rows that best-fit packing has made: sequence i is a pure function of (seed, epoch, i).

A shard's members are taken together into blocks of at least ``_BLOCK_ROWS`` rows' worth of ids, and each block is packed by itself
(``bestfit.pack_block``). How many rows a block has depends on its documents alone: it is counted once and kept in a small file, so that
prefix sums over shards and blocks find any row. An epoch permutes the shards, the documents of every block before they are
packed, and the rows of the whole line inside blocks of ``shuffle_tokens``, as the concatenated order does.

A row shorter than T + 1 ids is filled up with padding, which is no target and a document of its own.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swax_megatron.data.bestfit import count_rows, pack_block
from swax_megatron.data.index import ShardIndex
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SHUFFLE_TOKENS, Pieces, SequenceStream, copy_pieces
from swax_megatron.randomness import Permutation

_BLOCK_ROWS = 256  # a block's last rows are hardly full: larger blocks waste less, smaller ones are packed sooner
_VERSION = 1


@dataclass(frozen=True)
class PackingStatistics:
    """Of one epoch. padding: share of the rows' T + 1 places that hold none of the data."""

    rows: int
    padding: float
    documents_cut: int  # longer than a row
    documents_left_out: int  # of a single id: nothing to predict


@dataclass(frozen=True)
class Team:
    """Processes that open the same data set at the same time and count its rows together.

    gather: called by all of them, gives each what every one of them passed, in their order.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]

    def share(self, make: Callable[[], Any]) -> list[Any]:
        """What ``make`` gives each of them. Where it fails in one, all raise that error: none waits for it for ever."""
        try:
            mine = make()
        except (OSError, ValueError) as error:
            mine = error
        found = self.gather(mine)
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found


class BestFitStream(SequenceStream):
    """``stream[i]`` as of ``SequenceStream``, in rows of whole documents.

    tables: a folder where the counts of rows are kept between runs; None counts them at every opening (about a minute and a
    processor core for 20 billion tokens).  team: who shares the counting; all of it must make this stream.
    """

    packing = "best_fit"

    def __init__(
        self,
        dataset: ShardedDataset,
        sequence_length: int,
        seed: int,
        shuffle_tokens: int = SHUFFLE_TOKENS,
        tables: str | Path | None = None,
        team: Team = Team(),  # noqa: B008 - immutable
    ) -> None:
        self._tables_folder, self._team = None if tables is None else Path(tables), team
        self._pad = 1 if dataset.eos_id == 0 else 0
        super().__init__(dataset, sequence_length, seed, shuffle_tokens)

    def reopened(self, dataset: ShardedDataset) -> SequenceStream:
        stream = BestFitStream(dataset, self.sequence_length, self.seed, self.shuffle_tokens, self._tables_folder, self._team)
        stream.look_ahead = self.look_ahead
        return stream

    def _measure(self) -> tuple[np.ndarray, int]:
        table: np.ndarray | None = None

        def load() -> bool:
            nonlocal table
            table = self._load()
            return table is not None

        if not all(self._team.share(load)):  # on another host it may be missing
            table = self._count_all()
            self._save(table)
        shards = len(self.dataset.shards)
        filled, cut, left_out = (int(value) for value in table[2:5])
        blocks, rows = table[5 : 5 + shards], table[5 + shards :]
        self._block_ends = [np.cumsum(part) for part in np.split(rows, np.cumsum(blocks)[:-1])]
        total = int(rows.sum())
        padding = 1.0 - filled / (total * (self.sequence_length + 1)) if total else 0.0
        self.statistics = PackingStatistics(total, padding, cut, left_out)
        return np.array([ends[-1] for ends in self._block_ends]), 1

    def _count(self) -> int:
        if not self.statistics.rows:
            raise ValueError(f"data set {self.dataset.path} holds no document of two ids or more: there is nothing to predict")
        return self.statistics.rows

    def _count_all(self) -> np.ndarray:
        """[version, shards, ids in rows, documents cut, documents left out, blocks of each shard, rows of each block]."""
        shards, team = len(self.dataset.shards), self._team
        mine = range(team.rank, shards, team.size)
        self.dataset.fetch_ahead(mine, indices_only=True)
        parts = team.share(lambda: [self._count_shard(shard) for shard in mine])
        counts = [parts[shard % team.size][shard // team.size] for shard in range(shards)]
        filled, cut, left_out = (sum(count[k] for count in counts) for k in range(3))
        blocks, rows = [len(count[3]) for count in counts], [row for count in counts for row in count[3]]
        return np.array([_VERSION, shards, filled, cut, left_out, *blocks, *rows], np.int64)

    def _count_shard(self, shard: int) -> tuple[int, int, int, list[int]]:
        """Ids in rows, documents cut, documents left out, rows of each block."""
        index, length = self.dataset.index(shard), self.sequence_length
        firsts, lengths = block_starts(index, length), index.lengths
        rows = [count_rows(lengths[a:b], length) for a, b in zip(firsts, firsts[1:], strict=False)]
        targets = lengths - 1  # every id but the first is one; a piece holds one id more than it has targets
        filled = int((targets + -(-targets // length)).sum())
        return filled, int((targets > length).sum()), int((targets == 0).sum()), rows

    def _file(self) -> Path | None:
        """Named after everything that decides the counts."""
        if self._tables_folder is None:
            return None
        left_out = hashlib.sha256("\n".join(sorted(self.dataset.skipped)).encode()).hexdigest()[:8]
        return self._tables_folder / f"rows-{self.dataset.fingerprint[:32]}-{left_out}-{self.sequence_length}.npy"

    def _load(self) -> np.ndarray | None:
        file = self._file()
        if file is None or not file.exists():
            return None
        shards = len(self.dataset.shards)
        try:
            table = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it") from error
        fits = table[0] == _VERSION and table[1] == shards and table[5 : 5 + shards].sum() == len(table) - 5 - shards
        return table if fits else None

    def _save(self, table: np.ndarray) -> None:
        file = self._file()
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")  # the folder may be shared by hosts
        with open(aside, "wb") as target:
            np.save(target, table)
            target.flush()
            os.fsync(target.fileno())
        os.replace(aside, file)

    def _block_pieces(self, epoch: int, shard: int, block: int) -> _Rows:
        """The rows of a block in an epoch: its pieces, and the first one of each row."""
        index = self.dataset.index(shard)
        first, last = block_starts(index, self.sequence_length)[block : block + 2]
        order = Permutation(last - first, "data-best-fit", self.seed, epoch, shard, block)(np.arange(last - first))
        packed = pack_block(index.lengths[first:last][order], self.sequence_length)
        ends = self._block_ends[shard]
        counted = int(ends[block]) - (int(ends[block - 1]) if block else 0)
        if len(packed.starts) - 1 != counted:
            raise ValueError(f"{self._file()} does not count the rows of {self.dataset.path} as they are: delete it")
        return _Rows.of(self._pieces(index, first + order[packed.document], packed.skip, packed.length), packed.starts)

    def _read(self, epoch: int, start: int, ids: np.ndarray, mask: np.ndarray) -> int:
        """Fill ``ids`` and ``mask`` with row ``start`` of the epoch's line, and padding."""
        shards, place, within = self._find(epoch, start)
        shard = shards[place]
        block = int(self._block_ends[shard].searchsorted(within, side="right"))
        row = within - (int(self._block_ends[shard][block - 1]) if block else 0)
        table = self._table((epoch, shard, block), self._block_pieces)
        first, last = int(table.rows[row]), int(table.rows[row + 1])
        begin = int(table.ends[first - 1]) if first else 0
        filled = int(table.ends[last - 1]) - begin
        copy_pieces(self.dataset, shard, table, first, last, begin, ids[:filled], mask)
        ids[filled:], mask[filled:] = self._pad, False
        return filled


@dataclass(frozen=True)
class _Rows(Pieces):
    """Pieces, and the first one of each row: ``rows`` (R + 1,)."""

    rows: np.ndarray

    @classmethod
    def of(cls, pieces: Pieces, rows: np.ndarray) -> _Rows:
        return cls(pieces.ids_at, pieces.mask_at, pieces.ends, rows.astype(np.uint32))


def block_starts(index: ShardIndex, sequence_length: int) -> list[int]:
    """The first document of each block of a shard, and the number of documents at the end.

    Blocks begin with a member and hold about ``_BLOCK_ROWS`` rows' worth of ids or more; a short last one joins the one before.
    """
    size = _BLOCK_ROWS * sequence_length
    _, members = np.unique(index.members[:, 1] // size, return_index=True)
    if len(members) > 1 and index.header.tokens - int(index.members[members[-1], 1]) < size // 2:
        members = members[:-1]
    return [*index.members[members, 2].tolist(), index.header.documents]


def open_stream(
    dataset: ShardedDataset,
    sequence_length: int,
    seed: int,
    packing: str,
    shuffle_tokens: int,
    tables: str | Path | None = None,
    team: Team = Team(),  # noqa: B008 - immutable
) -> SequenceStream:
    """The stream of that kind of packing, "concatenate" or "best_fit"; ``tables`` and ``team`` as of ``BestFitStream``."""
    if packing == "best_fit":
        return BestFitStream(dataset, sequence_length, seed, shuffle_tokens, tables, team)
    return SequenceStream(dataset, sequence_length, seed, shuffle_tokens)
