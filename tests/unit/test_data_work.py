"""How work on a corpus is dealt out, told, and kept small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep import show, tokenizer
from data_prep.cli import Progress
from data_prep.fetch import copy_path
from data_prep.inputs import Input
from data_prep.pool import _OpenTask, _Queue
from data_prep.segments import Task
from swax_megatron.config import from_dict
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.sources import fit_cache
from tests.texts import EOS, run_shard, small_tokenizer, texts, write_ids, write_jsonl


def queue(counts: list[int | None], **options: object) -> _Queue:
    """Tasks of so many segments; None: only reading tells how many."""
    from collections import deque

    tasks = [Task(number, 0, "text", "jsonl", (), 1 << 20, count) for number, count in enumerate(counts)]
    return _Queue(_OpenTask(t, deque(range(t.segments or 0)), None if t.segments else 0, **options) for t in tasks)


def places(queue: _Queue, workers: list[object]) -> list[tuple[int, int] | None]:
    found = (queue.next(worker) for worker in workers)
    return [segment and segment.place for segment in found]


def test_workers_stay_with_their_files_then_help_the_first():
    a, b = object(), object()
    assert places(queue([3, 1, 2]), [a, b, a, b, b, a, a]) == [(0, 0), (1, 0), (0, 1), (2, 0), (2, 1), (0, 2), None]
    assert places(queue([2, 2]), [None] * 5) == [(0, 0), (0, 1), (1, 0), (1, 1), None]  # one process reads each file once, in order
    unknown = queue([None])
    assert places(unknown, [a, b]) == [(0, 0), (0, 1)]
    unknown.by_number[0].ended = True
    assert places(unknown, [a, b]) == [None, None]


def test_a_remote_file_is_fetched_by_one_worker():
    a, b, c = object(), object(), object()
    remote = queue([3, 3], fetched=False)
    assert places(remote, [a, b, c]) == [(0, 0), (1, 0), None]
    remote.by_number[1].fetched = True
    assert places(remote, [c, a]) == [(1, 1), (1, 2)]


def test_a_hundred_thousand_files_are_dealt_out_without_looking_at_all_of_them_each_time(monkeypatch):
    many, looked = queue([1] * 100_000), 0
    left = _OpenTask.left

    def count(self: _OpenTask) -> bool:
        nonlocal looked
        looked += 1
        return left(self)

    monkeypatch.setattr(_OpenTask, "left", count)
    workers = [object(), object()]
    assert sum(segment is not None for segment in places(many, workers * 50_001)) == 100_000
    assert looked < 300_000


def test_no_share_is_told_of_what_has_no_known_size(capsys):
    for total, wanted in ((1000, " 50.0 %, "), (None, "0 s; 0.0 MB of text")):
        Progress("reading", total, interval=0.0).add(500, 10, 1)
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line and ("%" in line) == (total is not None)


def test_every_phase_tells_how_far_it_is(tmp_path, capsys):
    model = small_tokenizer(tmp_path)
    source = write_jsonl(tmp_path / "a.jsonl", texts(200) * 2)
    capsys.readouterr()
    assert run_shard(Path(f"pipe:cat {source}"), model, tmp_path / "out", "--deduplicate", "--segment-bytes", "10K") == 0
    said = capsys.readouterr().err
    for phase in ("encoder: ", "sharding: done in ", "finding duplicates in train: done in ", "joining small shards of train: done in "):
        assert said.count(phase) == 1


def test_the_tokenizer_s_sample_counts_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n' * 3 + write_jsonl(tmp_path / "b", texts(100)).read_bytes())
    with open(tmp_path / "long.txt", "wb") as file:
        file.truncate(65 << 20)
    options = ["--out", str(tmp_path / "t.model"), "--vocab-size", "400", "--invalid-utf8", "skip"]
    assert tokenizer.main(["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "long.txt"), *options]) == 0
    assert "skipped 3 invalid utf8, 1 too long" in capsys.readouterr().err


def test_lengths_are_added_up_by_shard(tmp_path):
    lengths = [1, 1, 2, 3, 4, 7, 8, 40, 1000]
    dataset = ShardedDataset(write_ids(tmp_path / "set", [[5] * (length - 1) + [EOS] for length in lengths], shard_bytes=512))
    assert len(dataset.shards) > 1
    found = show.lengths_of(dataset)
    assert (found.documents.sum(), found.tokens.sum()) == (len(lengths), sum(lengths))
    lines = {int(line.split()[0]): line.split()[3] for line in show.histogram(found).splitlines()[1:]}
    assert {power: int(count) for power, count in lines.items() if int(count)} == {1: 2, 2: 2, 4: 2, 8: 1, 32: 1, 512: 1}
    assert (np.diff(show.EDGES) > 0).all() and set(2 ** np.arange(40)) <= set(show.EDGES.tolist())


def test_a_remote_input_of_another_size_is_another_copy(tmp_path):
    first, second = (copy_path(Input("s3://bucket/a.jsonl", "jsonl", size, remote=True), tmp_path) for size in (10, 11))
    assert first != second


def test_the_cache_must_hold_a_block_of_training_and_one_of_validation():
    def stream(size: float) -> SimpleNamespace:
        storage = SimpleNamespace(remote=True)
        return SimpleNamespace(dataset=SimpleNamespace(storage=storage), block_bytes=lambda: int(size * 2**30), look_ahead=1)

    config = from_dict({"data": {"cache_gib": 4.0}})
    train, held_out = stream(3.0), stream(2.0)
    fit_cache(config, [train])
    fit_cache(config, [held_out])
    assert held_out.look_ahead == 2
    with pytest.raises(ValueError, match="data.cache_gib=4: a shuffle block of the remote sources takes 5 GiB"):
        fit_cache(config, [train, held_out])
    config.data.cache_gib = 6.0
    fit_cache(config, [train, held_out])
    assert (train.look_ahead, held_out.look_ahead) == (1, 1)
