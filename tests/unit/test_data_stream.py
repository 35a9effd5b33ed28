"""The order of the data: complete, random-access, the same for ever."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from swax_megatron.data import stream as stream_module
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SequenceStream
from tests.texts import EOS, random_documents, write_ids


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    return ShardedDataset(write_ids(tmp_path_factory.mktemp("stream") / "set", random_documents(500)))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """Every id but EOS occurs once: 3, 4, 5, ... in documents of 1 to 40 ids; the mask is true for even ids."""
    lengths = 1 + np.arange(160) * 7 % 40
    starts = 3 + np.cumsum(np.append(0, lengths[:-1] - 1))
    documents = [[*range(start, start + length - 1), EOS] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
    masks = [[1 - i % 2 for i in ids] for ids in documents]
    folder = tmp_path_factory.mktemp("numbered") / "set"
    return ShardedDataset(write_ids(folder, documents, masks, vocab_size=int(lengths.sum()) + 3), max_open_shards=2)


@pytest.mark.parametrize("length, shuffle_tokens", [(1, 1 << 31), (16, 1 << 31), (16, 256), (1000, 1 << 31)])
def test_an_epoch_reads_every_token_once(numbered, length, shuffle_tokens):
    stream = SequenceStream(numbered, length, seed=3, shuffle_tokens=shuffle_tokens)
    assert stream.per_epoch == (numbered.tokens - 1) // length
    rows = [stream[i] for i in range(stream.per_epoch)]
    inputs = Counter(np.concatenate([ids[:-1] for ids, _ in rows]).tolist())
    targets = Counter(np.concatenate([ids[1:] for ids, _ in rows]).tolist())
    for seen in (inputs, targets):
        assert max(count for token, count in seen.items() if token != EOS) == 1
        assert numbered.tokens - sum(seen.values()) <= length  # the remainder that is dropped
    assert all((mask == (ids % 2 == 0)).all() and ids.dtype == np.int64 and mask.dtype == bool for ids, mask in rows)
    later = {int(ids[0]) for ids, _ in rows if ids[0] != EOS}
    ends = {int(ids[-1]) for ids, _ in rows if ids[-1] != EOS}
    assert len(ends - later) <= 1  # stride T: a sequence ends with the id that the next one begins with


def test_documents_stay_whole_and_rows_join(numbered):
    """Put an epoch's rows back into their line: every document is there in one piece."""
    stream = SequenceStream(numbered, 16, seed=5)
    rows = {stream._place(0, i): stream[i][0] for i in range(stream.per_epoch)}
    line = [rows[0].tolist()[0]] + [token for place in range(stream.per_epoch) for token in rows[place].tolist()[1:]]
    for before, after in zip(line, line[1:], strict=False):
        assert after == before + 1 or before == EOS or after == EOS


def test_random_access_equals_sequential(dataset):
    fresh = SequenceStream(dataset, 32, seed=1)
    total = 3 * fresh.per_epoch
    in_order = [fresh[i][0].tolist() for i in range(total)]
    for i in np.random.default_rng(0).permutation(total)[:300].tolist():
        assert SequenceStream(dataset, 32, seed=1)[i][0].tolist() == in_order[i]
        assert fresh[i][0].tolist() == in_order[i]
    assert fresh.epoch(total - 1) == 2 and fresh.epoch(total) == 3


def test_small_caches_change_nothing(dataset, monkeypatch):
    plain = SequenceStream(dataset, 32, seed=1)
    monkeypatch.setattr(stream_module, "_CACHED_DOCUMENTS", 1)
    monkeypatch.setattr(stream_module, "_INDEX_CHUNK", 3)
    monkeypatch.setattr(SequenceStream, "block_documents", lambda self: 1)
    tight = SequenceStream(ShardedDataset(dataset.path, max_open_shards=1), 32, seed=1)
    assert all((plain[i][0] == tight[i][0]).all() for i in range(0, 2 * plain.per_epoch, 3))
    assert len(tight._tables) == 1


@pytest.mark.parametrize("shuffle_tokens", [1 << 31, 4000])
def test_a_shuffle_block_of_short_documents_makes_each_table_once(shuffle_tokens, dataset, monkeypatch):
    """However many documents a block holds: otherwise every row would make the tables of its shards anew."""
    monkeypatch.setattr(stream_module, "_CACHED_DOCUMENTS", 1)
    stream = SequenceStream(dataset, 32, seed=1, shuffle_tokens=shuffle_tokens)
    made: Counter = Counter()

    def documents(epoch: int, shard: int) -> stream_module.Pieces:
        made[epoch, shard] += 1
        return SequenceStream._documents(stream, epoch, shard)

    monkeypatch.setattr(stream, "_documents", documents)
    for i in range(stream.per_epoch):
        stream[i]
    assert len(made) == len(dataset.shards) and set(made.values()) == {1}


def test_epochs_and_seeds_differ(dataset):
    stream, other = SequenceStream(dataset, 32, seed=1), SequenceStream(dataset, 32, seed=2)
    first = [tuple(stream[i][0]) for i in range(stream.per_epoch)]
    second = [tuple(stream[stream.per_epoch + i][0]) for i in range(stream.per_epoch)]
    assert len(set(first) & set(second)) < 0.05 * len(first)
    assert len(set(first) & {tuple(other[i][0]) for i in range(stream.per_epoch)}) < 0.05 * len(first)


def test_a_batch_mixes_shards(dataset):
    stream = SequenceStream(dataset, 32, seed=1)
    ends = stream._shards(0)[1]
    shards = {int(ends.searchsorted(stream._place(0, i) * 32, side="right")) for i in range(32)}
    assert len(shards) > len(dataset.shards) // 2


def test_golden_order(numbered):
    """These values are part of the format: a change breaks the resumption of every run made so far."""
    stream = SequenceStream(numbered, 8, seed=7)
    assert stream.per_epoch == GOLDEN_PER_EPOCH
    assert {i: stream[i][0].tolist() for i in GOLDEN} == GOLDEN
    blocks = SequenceStream(numbered, 8, seed=7, shuffle_tokens=64)
    assert [blocks._place(1, i) for i in range(10)] == GOLDEN_BLOCKS


def test_too_small_a_corpus(tmp_path):
    dataset = ShardedDataset(write_ids(tmp_path / "set", [[5, 6, 7, EOS]]))
    assert SequenceStream(dataset, 3, seed=0)[5][0].tolist() == [5, 6, 7, EOS]
    with pytest.raises(ValueError, match="holds 4 tokens, fewer than the 5 of one sequence: lower sequence_length to at most 3"):
        SequenceStream(dataset, 4, seed=0)
    with pytest.raises(ValueError, match="sequence_length=0"):
        SequenceStream(dataset, 0, seed=0)
    with pytest.raises(IndexError):
        SequenceStream(dataset, 3, seed=0)[-1]


GOLDEN_PER_EPOCH = 409
GOLDEN = {
    0: [724, 725, 726, 727, 728, 729, 730, 731, 732],
    7: [2303, 2304, 2305, 2306, 2307, 2308, 2309, 2, 2248],
    258: [2148, 2149, 2150, 2151, 2152, 2153, 2154, 2, 2023],
    100_001: [782, 2, 578, 579, 580, 581, 582, 583, 584],
}
GOLDEN_BLOCKS = [7, 0, 2, 4, 5, 1, 3, 6, 12, 11]
