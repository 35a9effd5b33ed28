"""An endless, random-access order of a data set: sequence i is a pure function of (seed, epoch, i).

An epoch lays every document once into one line of tokens: shards permuted by (seed, epoch), documents inside a shard
permuted by (seed, epoch, shard). Sequence p of the line holds the ids [p T, p T + T + 1): T inputs and T targets, so that
every id but the epoch's first is a target once. What is left at the end of an epoch (fewer than T + 1 ids) is dropped;
another order drops others in the next epoch. The sequences are then permuted inside blocks of ``shuffle_tokens``, so
that a global batch mixes shards while only one block's document tables (and, of a remote data set, files) are in use.

No state: prefix sums over shards and over documents find any sequence by two binary searches. Caches are shared by
threads under a lock; what takes long happens outside of it, so that several threads may read at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from swax_megatron.data.shards import ShardedDataset
from swax_megatron.randomness import Permutation

SHUFFLE_TOKENS = 1 << 31
_CACHED_DOCUMENTS = 1 << 24  # 8 to 12 bytes each; more where a shuffle block holds more: every row of it looks into all its tables
_INDEX_CHUNK = 1024


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in the order they are read, (P,) each.

    ids_at, mask_at: where each begins in the tar, in ids and in bytes.  ends: prefix sums of their lengths in ids.
    """

    ids_at: np.ndarray
    mask_at: np.ndarray | None
    ends: np.ndarray


class SequenceStream:
    """``stream[i]`` for any i >= 0: (ids (T + 1,) int64, mask (T + 1,) bool), the mask true where an id may be a target.

    dataset: the opened data set.  sequence_length: T in tokens.  seed: the data seed.
    shuffle_tokens: sequences are shuffled inside blocks of this many tokens; part of the order's definition.
    Raises ValueError if the data set holds fewer than T + 1 ids.
    """

    packing = "concatenate"

    def __init__(self, dataset: ShardedDataset, sequence_length: int, seed: int, shuffle_tokens: int = SHUFFLE_TOKENS) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length}: must be at least 1")
        self.dataset, self.sequence_length, self.seed, self.shuffle_tokens = dataset, sequence_length, seed, shuffle_tokens
        self.look_ahead = 1  # blocks of a remote data set whose files are fetched, the current one included
        self._block = max(1, shuffle_tokens // sequence_length)
        self._lock = threading.Lock()
        self._epochs: OrderedDict[int, tuple[list[int], np.ndarray]] = OrderedDict()
        self._places: OrderedDict[tuple[int, int, int], list[int]] = OrderedDict()
        self._tables: OrderedDict[Hashable, Pieces] = OrderedDict()
        self._cached = 0
        self._shard_units, self._row_units = self._measure()
        self.per_epoch = self._count()
        self._shards(0)  # the first epoch's order of shards, so that the first position is found as fast as any
        self._most_cached = max(_CACHED_DOCUMENTS, self.block_documents())

    def _measure(self) -> tuple[np.ndarray, int]:
        """The length of each shard (S,) in the units of the epoch's line, and how many of them a sequence moves on."""
        return self.dataset.shard_tokens, self.sequence_length

    def _count(self) -> int:
        dataset, length = self.dataset, self.sequence_length
        if dataset.tokens < length + 1:
            raise ValueError(
                f"data set {dataset.path} holds {dataset.tokens} tokens, fewer than the {length + 1} of one sequence: "
                f"lower sequence_length to at most {dataset.tokens - 1} or add documents"
            )
        return (dataset.tokens - 1) // length

    def reopened(self, dataset: ShardedDataset) -> SequenceStream:
        """The same order rules over another opening of the data set."""
        stream = type(self)(dataset, self.sequence_length, self.seed, self.shuffle_tokens)
        stream.look_ahead = self.look_ahead
        return stream

    def block_bytes(self) -> int:
        """The most bytes of shards that a shuffle block touches: its share of the data, and two shards that it begins and ends in."""
        sizes = sorted((entry["bytes"] + entry["index_bytes"] for entry in self.dataset.shards), reverse=True)
        return min(sum(sizes), int(self._block_share() * sum(sizes)) + sum(sizes[:2]))

    def block_documents(self) -> int:
        """The most documents, and pieces of long ones, whose places a shuffle block looks up; as ``block_bytes``."""
        counts = sorted(self.dataset.shard_documents.tolist(), reverse=True)
        return int(self._block_share() * (sum(counts) + self.per_epoch)) + sum(counts[:2])

    def _block_share(self) -> float:
        """The share of an epoch that a shuffle block is."""
        return min(1.0, self._block / self.per_epoch)

    def epoch(self, index: int) -> int:
        """The epoch of sequence ``index``."""
        return index // self.per_epoch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = np.empty(self.sequence_length + 1, np.int64), np.empty(self.sequence_length + 1, bool)
        self.read_into(index, ids, mask)
        return ids, mask

    def read_into(self, index: int, ids: np.ndarray, mask: np.ndarray) -> int:
        """Write sequence ``index`` into ``ids`` (T + 1,) of any integer type and ``mask`` (T + 1,) bool.

        Returns how many ids are no padding: the first ones.
        """
        if index < 0:
            raise IndexError(f"sequence {index}: must be 0 or more")
        epoch, within = divmod(int(index), self.per_epoch)
        if not self.dataset.has_mask:
            mask[:] = True
        return self._read(epoch, self._place(epoch, within) * self._row_units, ids, mask)

    def _place(self, epoch: int, within: int) -> int:
        """Where in the epoch's line sequence ``within`` lies; evaluated for many sequences at once and kept."""
        block, offset = divmod(within, self._block)
        chunk, rest = divmod(offset, _INDEX_CHUNK)
        key = (epoch, block, chunk)
        with self._lock:
            places = self._places.get(key)
        if places is None:
            first = block * self._block
            size = min(self._block, self.per_epoch - first)
            wanted = np.arange(chunk * _INDEX_CHUNK, min((chunk + 1) * _INDEX_CHUNK, size))
            places = (first + Permutation(size, "data-sequences", self.seed, epoch, block)(wanted)).tolist()
            self._fetch_ahead(epoch, block)
            with self._lock:
                _remember(self._places, key, places, 8)
        return places[rest]

    def _fetch_ahead(self, epoch: int, block: int) -> None:
        """Begin to fetch the files of this block of a remote data set, and of the next ones."""
        if not self.dataset.storage.remote:
            return
        for _ in range(self.look_ahead):
            shards, ends = self._shards(epoch)
            low = block * self._block * self._row_units
            high = min((block + 1) * self._block, self.per_epoch) * self._row_units
            first, last = ends.searchsorted(low, side="right"), ends.searchsorted(high, side="left")
            self.dataset.fetch_ahead(shards[first : last + 1])
            block += 1
            if block * self._block >= self.per_epoch:
                epoch, block = epoch + 1, 0

    def _shards(self, epoch: int) -> tuple[list[int], np.ndarray]:
        """The epoch's order of shards and the prefix sums of their lengths."""
        with self._lock:
            if epoch not in self._epochs:
                count = len(self.dataset.shards)
                order = Permutation(count, "data-shards", self.seed, epoch)(np.arange(count))
                _remember(self._epochs, epoch, (order.tolist(), np.cumsum(self._shard_units[order])), 2)
            return self._epochs[epoch]

    def _find(self, epoch: int, start: int) -> tuple[list[int], int, int]:
        """The epoch's order of shards, the place in it of the shard that holds unit ``start``, and the unit's number in the shard."""
        shards, ends = self._shards(epoch)
        place = int(ends.searchsorted(start, side="right"))
        return shards, place, start - (int(ends[place - 1]) if place else 0)

    def _table(self, key: Hashable, make: Any) -> Pieces:
        """A table that ``make`` builds, kept while it is among those used last."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = make(*key)
        with self._lock:
            if key not in self._tables:
                self._tables[key] = table
                self._cached += len(table.ends)
            while self._cached > self._most_cached and len(self._tables) > 1:
                self._cached -= len(self._tables.popitem(last=False)[1].ends)
        return table

    def _documents(self, epoch: int, shard: int) -> Pieces:
        """The epoch's order of a shard's documents."""
        index = self.dataset.index(shard)
        order = Permutation(index.header.documents, "data-documents", self.seed, epoch, shard)(np.arange(index.header.documents))
        return self._pieces(index, order, 0, index.lengths[order])

    def _pieces(self, index: Any, documents: np.ndarray, skip: np.ndarray | int, lengths: np.ndarray) -> Pieces:
        """Compact tables of pieces: ``skip`` ids into each of ``documents``, ``lengths`` long."""
        ids_at = index.document_offsets(0, self.dataset.dtype.itemsize)[documents] + skip
        mask_at = index.document_offsets(3, 1)[documents] + skip if self.dataset.has_mask else None
        ends = np.cumsum(lengths)
        kind = np.int64 if index.header.tar_bytes >= 1 << 32 else np.uint32
        return Pieces(ids_at.astype(kind), None if mask_at is None else mask_at.astype(kind), ends.astype(kind))

    def _read(self, epoch: int, start: int, ids: np.ndarray, mask: np.ndarray) -> int:
        """Fill ``ids`` and ``mask`` from token ``start`` of the epoch's line on."""
        shards, place, within = self._find(epoch, start)
        filled = self._copy_line(epoch, shards[place], within, ids, mask)
        while filled < len(ids):
            place += 1
            filled += self._copy_line(epoch, shards[place], 0, ids[filled:], mask[filled:])
        return filled

    def _copy_line(self, epoch: int, shard: int, start: int, ids: np.ndarray, mask: np.ndarray) -> int:
        """Fill ``ids`` and ``mask`` from token ``start`` of a shard's line on; returns how many were there."""
        table = self._table((epoch, shard), self._documents)
        stop = min(start + len(ids), int(table.ends[-1]))
        kind = table.ends.dtype.type  # a Python integer would make numpy cast the whole table at every call
        first = int(table.ends.searchsorted(kind(start), side="right"))
        last = int(table.ends.searchsorted(kind(stop), side="left")) + 1
        copy_pieces(self.dataset, shard, table, first, last, start, ids[: stop - start], mask)
        return stop - start


def copy_pieces(
    dataset: ShardedDataset, shard: int, table: Pieces, first: int, last: int, start: int, ids: np.ndarray, mask: np.ndarray
) -> None:
    """Fill ``ids`` (n,), and ``mask`` where the data has one, from pieces ``first`` to ``last`` of a table.

    start: the token of the table's line that ``ids[0]`` is; the first piece may begin before it, the last end after the n ids.
    """
    tar, stop = dataset.tar(shard), start + len(ids)
    begin = int(table.ends[first - 1]) if first else 0
    stored = ids if ids.dtype == dataset.dtype else np.empty(len(ids), dataset.dtype)
    flags = None if table.mask_at is None else np.empty(len(ids), np.uint8)
    ends, ids_at = table.ends[first:last].tolist(), table.ids_at[first:last].tolist()
    mask_at = None if table.mask_at is None else table.mask_at[first:last].tolist()
    item = dataset.dtype.itemsize
    for k, end in enumerate(ends):
        low, high = max(begin, start), min(end, stop)
        tar.read_into((ids_at[k] + low - begin) * item, stored[low - start : high - start])
        if mask_at is not None:
            tar.read_into(mask_at[k] + low - begin, flags[low - start : high - start])
        begin = end
    if int(stored.max()) >= dataset.vocab_size:
        raise ValueError(
            f"data set {dataset.path} is damaged: it holds the id {int(stored.max())}, "
            f"and its vocabulary has {dataset.vocab_size}; find the file with data_prep/verify.py and copy the data set again"
        )
    if stored is not ids:
        ids[:] = stored
    if flags is not None:
        np.not_equal(flags, 0, out=mask[: len(ids)])


def _remember(cache: OrderedDict, key: object, value: object, limit: int) -> None:
    """Keep a value, forgetting the oldest beyond ``limit``."""
    cache[key] = value
    if len(cache) > limit:
        cache.popitem(last=False)
