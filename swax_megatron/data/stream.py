"""An endless, random-access order of a data set: sequence i is a pure function of (seed, epoch, i).

An epoch lays every document once into one line of tokens: shards permuted by (seed, epoch), documents inside a shard
permuted by (seed, epoch, shard). Sequence p of the line holds the ids [p T, p T + T + 1): T inputs and T targets, so that
every id but the epoch's first is a target once. What is left at the end of an epoch (fewer than T + 1 ids) is dropped;
another order drops others in the next epoch. The sequences are then permuted inside blocks of ``shuffle_tokens``, so
that a global batch mixes shards while only one block's document tables are in use.

No state: prefix sums over shards and over documents find any sequence by two binary searches.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from swax_megatron.data.shards import ShardedDataset
from swax_megatron.randomness import Permutation

SHUFFLE_TOKENS = 1 << 31
_CACHED_DOCUMENTS = 1 << 24  # 16 to 24 bytes each
_INDEX_CHUNK = 1024


@dataclass(frozen=True)
class _ShardOrder:
    """The documents of a shard in an epoch's order; ``ends`` (D,) are prefix sums of their lengths in ids."""

    id_offsets: np.ndarray
    mask_offsets: np.ndarray | None
    ends: np.ndarray


class SequenceStream:
    """``stream[i]`` for any i >= 0: (ids (T + 1,) int64, mask (T + 1,) bool), the mask true where an id may be a target.

    dataset: the opened data set.  sequence_length: T in tokens.  seed: the data seed.
    shuffle_tokens: sequences are shuffled inside blocks of this many tokens; part of the order's definition.
    Raises ValueError if the data set holds fewer than T + 1 ids.
    """

    def __init__(self, dataset: ShardedDataset, sequence_length: int, seed: int, shuffle_tokens: int = SHUFFLE_TOKENS) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length}: must be at least 1")
        if dataset.tokens < sequence_length + 1:
            raise ValueError(
                f"data set {dataset.path} holds {dataset.tokens} tokens, fewer than the {sequence_length + 1} of one sequence: "
                f"lower sequence_length to at most {dataset.tokens - 1} or add documents"
            )
        self.dataset, self.sequence_length, self.seed = dataset, sequence_length, seed
        self.per_epoch = (dataset.tokens - 1) // sequence_length
        self._block = max(1, shuffle_tokens // sequence_length)
        self._epochs: OrderedDict[int, tuple[list[int], np.ndarray]] = OrderedDict()
        self._places: OrderedDict[tuple[int, int, int], list[int]] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], _ShardOrder] = OrderedDict()
        self._cached = 0

    def epoch(self, index: int) -> int:
        """The epoch of sequence ``index``."""
        return index // self.per_epoch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = np.empty(self.sequence_length + 1, np.int64), np.empty(self.sequence_length + 1, bool)
        self.read_into(index, ids, mask)
        return ids, mask

    def read_into(self, index: int, ids: np.ndarray, mask: np.ndarray) -> None:
        """Write sequence ``index`` into ``ids`` (T + 1,) of any integer type and ``mask`` (T + 1,) bool."""
        if index < 0:
            raise IndexError(f"sequence {index}: must be 0 or more")
        epoch, within = divmod(int(index), self.per_epoch)
        self._read(epoch, self._place(epoch, within) * self.sequence_length, ids, mask)

    def _place(self, epoch: int, within: int) -> int:
        """Where in the epoch's line sequence ``within`` lies; evaluated for many sequences at once and kept."""
        block, offset = divmod(within, self._block)
        chunk, rest = divmod(offset, _INDEX_CHUNK)
        key = (epoch, block, chunk)
        if key not in self._places:
            first = block * self._block
            size = min(self._block, self.per_epoch - first)
            wanted = np.arange(chunk * _INDEX_CHUNK, min((chunk + 1) * _INDEX_CHUNK, size))
            places = first + Permutation(size, "data-sequences", self.seed, epoch, block)(wanted)
            _remember(self._places, key, places.tolist(), 8)
        return self._places[key][rest]

    def _shards(self, epoch: int) -> tuple[list[int], np.ndarray]:
        """The epoch's order of shards and the prefix sums of their tokens."""
        if epoch not in self._epochs:
            count = len(self.dataset.shards)
            order = Permutation(count, "data-shards", self.seed, epoch)(np.arange(count))
            _remember(self._epochs, epoch, (order.tolist(), np.cumsum(self.dataset.shard_tokens[order])), 2)
        return self._epochs[epoch]

    def _documents(self, epoch: int, shard: int) -> _ShardOrder:
        """The epoch's order of a shard's documents, kept for the shards used last."""
        key = (epoch, shard)
        if key in self._orders:
            self._orders.move_to_end(key)
            return self._orders[key]
        opened = self.dataset.shard(shard)
        count = len(opened.lengths)
        order = Permutation(count, "data-documents", self.seed, epoch, shard)(np.arange(count))
        mask_offsets = None if opened.mask_offsets is None else opened.mask_offsets[order]
        entry = _ShardOrder(opened.id_offsets[order], mask_offsets, np.cumsum(opened.lengths[order]))
        self._orders[key] = entry
        self._cached += count
        while self._cached > _CACHED_DOCUMENTS and len(self._orders) > 1:
            self._cached -= len(self._orders.popitem(last=False)[1].ends)
        return entry

    def _read(self, epoch: int, start: int, ids: np.ndarray, mask: np.ndarray) -> None:
        """Fill ``ids`` and ``mask`` from token ``start`` of the epoch's line on."""
        shards, shard_ends = self._shards(epoch)
        place = int(shard_ends.searchsorted(start, side="right"))
        within = start - (int(shard_ends[place - 1]) if place else 0)
        filled = self._copy(epoch, shards[place], within, ids, mask)
        while filled < len(ids):
            place += 1
            filled += self._copy(epoch, shards[place], 0, ids[filled:], mask[filled:])
        if not self.dataset.has_mask:
            mask[:] = True
        if int(ids.max()) >= self.dataset.vocab_size:
            raise ValueError(
                f"data set {self.dataset.path} is damaged: it holds the id {int(ids.max())}, "
                f"and its vocabulary has {self.dataset.vocab_size}; find the file with data_prep/verify.py and copy the data set again"
            )

    def _copy(self, epoch: int, shard: int, start: int, ids: np.ndarray, mask: np.ndarray) -> int:
        """Fill ``ids`` and ``mask`` from token ``start`` of a shard's line on; returns how many were there."""
        order, opened = self._documents(epoch, shard), self.dataset.shard(shard)
        stop = min(start + len(ids), int(order.ends[-1]))
        first = int(order.ends.searchsorted(start, side="right"))
        last = int(order.ends.searchsorted(stop, side="left")) + 1
        begin = int(order.ends[first - 1]) if first else 0
        ends, id_offsets = order.ends[first:last].tolist(), order.id_offsets[first:last].tolist()
        mask_offsets = None if order.mask_offsets is None else order.mask_offsets[first:last].tolist()
        for k, end in enumerate(ends):
            low, high = max(begin, start), min(end, stop)
            skip, size, at = low - begin, high - low, low - start
            source = id_offsets[k] + skip
            ids[at : at + size] = opened.ids[source : source + size]
            if mask_offsets is not None:
                source = mask_offsets[k] + skip
                mask[at : at + size] = opened.bytes[source : source + size]
            begin = end
        return stop - start


def _remember(cache: OrderedDict, key: object, value: object, limit: int) -> None:
    """Keep a value, forgetting the oldest beyond ``limit``."""
    cache[key] = value
    if len(cache) > limit:
        cache.popitem(last=False)
