"""Best-fit packing: every token once, short documents whole, the same rows from any position."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swax_megatron.data import rows as rows_module
from swax_megatron.data.bestfit import count_rows, pack_block
from swax_megatron.data.packing import pack
from swax_megatron.data.rows import BestFitStream, Team, open_stream
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SequenceStream
from tests.texts import EOS, random_documents, write_ids

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=80)


def plain_best_fit(sizes: list[int], capacity: int) -> int:
    """Rows of best-fit decreasing, one piece at a time."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    return len(rooms)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, targets=st.integers(1, 40))
def test_every_token_once_and_short_documents_whole(lengths, targets):
    packed = pack_block(np.array(lengths), targets)
    seen = Counter()
    for piece in range(len(packed.document)):
        document, skip, size = int(packed.document[piece]), int(packed.skip[piece]), int(packed.length[piece])
        assert size >= 2 and skip + size <= lengths[document]
        seen.update((document, position) for position in range(skip + 1, skip + size))  # the targets
        if lengths[document] <= targets + 1:
            assert (skip, size) == (0, lengths[document])  # not cut
    assert seen == Counter((document, position) for document, length in enumerate(lengths) for position in range(1, length))
    filled = [int(packed.length[a:b].sum()) for a, b in zip(packed.starts, packed.starts[1:], strict=False)]
    assert all(2 <= size <= targets + 1 for size in filled)
    assert int(packed.starts[-1]) == len(packed.document)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, targets=st.integers(1, 40), seed=st.integers(0, 9))
def test_the_number_of_rows_is_best_fit_s_and_does_not_depend_on_the_order(lengths, targets, seed):
    rests = [(length - 1) % targets + 1 for length in lengths if (length - 1) % targets]
    rows = sum((length - 1) // targets for length in lengths) + plain_best_fit(rests, targets + 1)
    shuffled = np.random.default_rng(seed).permutation(lengths)
    assert count_rows(np.array(lengths), targets) == rows
    assert len(pack_block(shuffled, targets).starts) - 1 == rows


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """Every id but EOS occurs once; documents of 1 to 60 ids; the mask is true for even ids; several small shards."""
    lengths = 1 + np.arange(300) * 7 % 60
    starts = 3 + np.cumsum(np.append(0, lengths[:-1] - 1))
    documents = [[*range(start, start + length - 1), EOS] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
    masks = [[1 - i % 2 for i in ids] for ids in documents]
    folder = tmp_path_factory.mktemp("numbered") / "set"
    return ShardedDataset(write_ids(folder, documents, masks, vocab_size=int(lengths.sum()) + 3), max_open_shards=2)


@pytest.mark.parametrize("length, block_rows, shuffle_tokens", [(24, 256, 1 << 31), (24, 4, 200), (100, 2, 1 << 31)])
def test_an_epoch_reads_every_token_once(numbered, length, block_rows, shuffle_tokens, monkeypatch):
    monkeypatch.setattr(rows_module, "_BLOCK_ROWS", block_rows)
    stream = BestFitStream(numbered, length, seed=3, shuffle_tokens=shuffle_tokens)
    orders = []
    for epoch in (0, 1):
        targets: Counter = Counter()
        padding = 0
        for i in range(epoch * stream.per_epoch, (epoch + 1) * stream.per_epoch):
            ids, mask = np.empty(length + 1, np.int64), np.empty(length + 1, bool)
            filled = stream.read_into(i, ids, mask)
            assert (ids[filled:] == 0).all() and not mask[filled:].any()
            assert (mask[:filled] == (ids[:filled] % 2 == 0)).all()
            after_eos = np.flatnonzero(ids[: filled - 1] == EOS) + 1
            targets.update(np.delete(ids[:filled], [0, *after_eos]).tolist())
            padding += length + 1 - filled
            orders.append(ids.tolist())
        long = [n for n in numbered_lengths(numbered) if n >= 2]
        assert targets[EOS] == len(long)
        assert sum(targets.values()) == sum(n - 1 for n in long) and max(n for i, n in targets.items() if i != EOS) == 1
        assert stream.statistics.padding == pytest.approx(padding / (stream.per_epoch * (length + 1)))
    assert stream.statistics.documents_cut == sum(n > length + 1 for n in numbered_lengths(numbered))
    assert stream.statistics.documents_left_out == sum(n == 1 for n in numbered_lengths(numbered))
    half = stream.per_epoch
    assert orders[:half] != orders[half:] and sorted(orders[:half]) != sorted(orders[half:])  # other rows, other order


def numbered_lengths(dataset: ShardedDataset) -> list[int]:
    return [int(n) for shard in range(len(dataset.shards)) for n in dataset.index(shard).lengths]


def test_random_access_equals_sequential(numbered):
    stream = BestFitStream(numbered, 24, seed=5)
    in_order = [stream[i][0].tolist() for i in range(2 * stream.per_epoch)]
    for i in np.random.default_rng(0).permutation(len(in_order))[:100].tolist():
        assert BestFitStream(numbered, 24, seed=5)[i][0].tolist() == in_order[i]
    assert BestFitStream(numbered, 24, seed=6)[0][0].tolist() != in_order[0]


def test_golden_rows(numbered):
    """Part of the format: a change breaks the resumption of every run made so far."""
    stream = BestFitStream(numbered, 24, seed=7)
    assert stream.per_epoch == GOLDEN_PER_EPOCH
    assert {i: stream[i][0].tolist() for i in GOLDEN} == GOLDEN


def test_padding_is_masked_and_a_document_of_its_own(numbered):
    stream = BestFitStream(numbered, 24, seed=1)
    ids, mask = np.empty(25, np.uint16), np.empty(25, bool)
    index, filled = next((i, n) for i in range(stream.per_epoch) if (n := stream.read_into(i, ids, mask)) < 20)
    stream.read_into(index, ids, mask)
    batch = pack(ids[None], np.arange(25)[None] < filled, EOS)
    assert batch.loss_mask_bt[0, filled - 1 :].sum() == 0
    assert filled in batch.cu_seqlens.tolist() and batch.cu_seqlens.tolist()[-1] == 24
    assert batch.positions_bt[0, filled:].tolist() == list(range(24 - filled))


def test_the_counts_of_rows_are_kept(numbered, tmp_path, monkeypatch):
    first = open_stream(numbered, 24, 1, "best_fit", 1 << 31, tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(BestFitStream, "_count_all", lambda self: pytest.fail("counted again"))
    again = open_stream(numbered, 24, 1, "best_fit", 1 << 31, tmp_path)
    assert again.statistics == first.statistics and (again[5][0] == first[5][0]).all()
    table = np.load(file)
    table[-1] += 1
    np.save(file, table)
    wrong = open_stream(numbered, 24, 1, "best_fit", 1 << 31, tmp_path)
    with pytest.raises(ValueError, match="does not count the rows.*delete it"):
        for i in range(wrong.per_epoch):
            wrong[i]
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="rows-.*npy is damaged.*delete it"):
        open_stream(numbered, 24, 1, "best_fit", 1 << 31, tmp_path)


def together(size: int, make: Callable[[Team], Any]) -> list[Any]:
    """What ``make`` gives, or raises, in each of ``size`` threads that count together."""
    barrier, passed = threading.Barrier(size), [None] * size

    def gather(rank: int, mine: Any) -> list[Any]:
        passed[rank] = mine
        barrier.wait(20)
        found = list(passed)
        barrier.wait(20)
        return found

    def run(rank: int) -> Any:
        try:
            return make(Team(rank, size, lambda mine: gather(rank, mine)))
        except ValueError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 5])
def test_several_processes_count_together(size, numbered, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_BLOCK_ROWS", 4)
    counted: Counter = Counter()
    count_shard = BestFitStream._count_shard
    monkeypatch.setattr(BestFitStream, "_count_shard", lambda self, shard: counted.update([shard]) or count_shard(self, shard))
    alone = BestFitStream(numbered, 24, 3)
    counted.clear()

    def make(team: Team) -> BestFitStream:  # each on a host of its own
        dataset = ShardedDataset(numbered.path)
        return open_stream(dataset, 24, 3, "best_fit", 1 << 31, tmp_path / str(team.rank), team)

    streams = together(size, make)
    assert counted == {shard: 1 for shard in range(len(numbered.shards))}
    assert all(stream.statistics == alone.statistics for stream in streams)
    assert all((stream[i][0] == alone[i][0]).all() for stream in streams for i in range(0, alone.per_epoch, 7))
    (kept,) = (tmp_path / "1").iterdir()
    kept.unlink()  # a host that has lost its table: all count again
    counted.clear()
    together(size, make)
    assert counted == {shard: 1 for shard in range(len(numbered.shards))} and kept.exists()
    kept.write_bytes(b"damaged")
    errors = together(size, make)
    assert all("is damaged" in str(error) for error in errors) and len(errors) == size


def test_only_empty_documents(tmp_path):
    dataset = ShardedDataset(write_ids(tmp_path / "set", [[EOS]] * 40))
    with pytest.raises(ValueError, match="nothing to predict"):
        BestFitStream(dataset, 8, seed=0)


def test_best_fit_cuts_less_than_concatenation(tmp_path: Path) -> None:
    """What it is for: the share of documents that a row's end cuts."""
    dataset = ShardedDataset(write_ids(tmp_path / "set", random_documents(2000, longest=30), shard_bytes=1 << 20))
    best, plain = BestFitStream(dataset, 64, seed=0), SequenceStream(dataset, 64, seed=0)
    whole = sum(plain[i][0][-1] == EOS for i in range(plain.per_epoch))
    assert best.statistics.documents_cut == 0 and best.statistics.padding < 0.03
    assert whole < 0.2 * plain.per_epoch
    assert all(ids[mask][-1] == EOS for ids, mask in map(best.__getitem__, range(best.per_epoch)))


GOLDEN_PER_EPOCH = 388
GOLDEN = {
    0: [
        963, 964, 965, 966, 967, 968, 969, 970, 971, 972, 973, 974,
        975, 976, 977, 978, 979, 980, 981, 982, 983, 984, 985, 986, 987,
    ],
    7: [
        6796, 6797, 2, 6912, 2, 6870, 6871, 6872, 6873, 6874, 6875, 6876,
        6877, 6878, 6879, 6880, 6881, 6882, 6883, 6884, 6885, 6886, 6887, 2, 0,
    ],
    500: [
        199, 200, 201, 202, 203, 204, 205, 206, 207, 208, 209, 210,
        211, 212, 213, 214, 215, 216, 217, 218, 219, 220, 221, 222, 223,
    ],
    100001: [
        8518, 8519, 8520, 8521, 8522, 8523, 8524, 8525, 8526, 8527, 8528, 8529,
        8530, 8531, 8532, 8533, 8534, 8535, 8536, 8537, 8538, 8539, 8540, 8541, 8542,
    ],
}
