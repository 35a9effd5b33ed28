"""Damaged and missing shards: stop by default; by option they are left out, once, and the order stays exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from swax_megatron.data.mixture import Mixture
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SequenceStream
from tests.texts import random_documents, write_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_ids(tmp_path / "set", random_documents(400))


def damage(folder: Path, shard: int, how: str) -> None:
    tar, index = folder / f"shard-{shard:06d}.tar", folder / f"shard-{shard:06d}.idx"
    if how == "missing":
        tar.unlink()
    elif how == "truncated":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif how == "index":
        index.write_bytes(index.read_bytes()[8:])
    else:
        data = bytearray(tar.read_bytes())
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)


def mixture(folder: Path, **options: object) -> Mixture:
    return Mixture([SequenceStream(ShardedDataset(folder, **options), 16, seed=1)], [1.0], ["web"], seed=1)


@pytest.mark.parametrize("how, verify", [("missing", "size"), ("truncated", "size"), ("index", "size"), ("flipped", "sha256")])
def test_stop_or_leave_out(how, verify, folder):
    whole = ShardedDataset(folder)
    damage(folder, 1, how)
    with pytest.raises(ValueError, match="shard-000001"):
        ShardedDataset(folder, verify)
    dataset = ShardedDataset(folder, verify, damaged="skip")
    assert list(dataset.skipped) == ["shard-000001.tar"] and "copy the data set again" in dataset.skipped["shard-000001.tar"]
    assert dataset.documents == whole.documents - int(whole.shard_documents[1])
    stream = SequenceStream(dataset, 16, seed=1)
    seen = {tuple(stream[i][0]) for i in range(stream.per_epoch)}
    assert len(seen) == stream.per_epoch


def test_everything_damaged(folder):
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(ValueError, match="every shard of .* is damaged"):
        ShardedDataset(folder, damaged="skip")
    with pytest.raises(ValueError, match="damaged='ignore'"):
        ShardedDataset(folder, damaged="ignore")


def test_a_resume_reads_the_shards_that_the_run_read(folder):
    tar = folder / "shard-000001.tar"
    content = tar.read_bytes()
    tar.unlink()
    first = mixture(folder, damaged="skip")
    _, state = first.plan(first.initial_state(), 30)
    saved = json.loads(json.dumps(first.state_to_json(state)))
    assert saved["sources"]["web"]["skipped"] == ["shard-000001.tar"]
    plan, _ = first.plan(state, 40)
    expected = first.load(plan).ids_bt1
    tar.write_bytes(content)  # repaired: it stays left out
    for options in ({}, {"damaged": "skip"}):
        resumed = mixture(folder, **options)
        assert resumed.state_from_json(saved) == state
        assert (resumed.load(resumed.plan(state, 40)[0]).ids_bt1 == expected).all()
        assert resumed.state_to_json(state) == first.state_to_json(state)
    damage(folder, 2, "missing")  # another one: exact continuation is impossible
    with pytest.raises(ValueError, match="source 'web' lost shard-000002.tar since the checkpoint .*restore the file, or start a new run"):
        mixture(folder, damaged="skip").state_from_json(saved)


def test_damage_while_reading_stops(folder):
    stream = SequenceStream(ShardedDataset(folder, damaged="skip"), 16, seed=1)
    damage(folder, 0, "missing")
    with pytest.raises(ValueError, match="shard-000000.tar is missing"):
        for i in range(stream.per_epoch):
            stream[i]


def test_fewer_shards_than_readers(tmp_path):
    """One shard, sixteen ranks: rows are dealt out, not shards."""
    data = mixture(write_ids(tmp_path / "set", random_documents(300), shard_bytes=1 << 20))
    assert len(data.streams[0].dataset.shards) == 1
    plan, _ = data.plan(data.initial_state(), 64)
    parts = [data.load(plan[rank * 4 : rank * 4 + 4]).ids_bt1 for rank in range(16)]
    assert (np.concatenate(parts) == data.load(plan).ids_bt1).all()


@pytest.mark.parametrize("how, sentence", [("truncated", "shard-000000.tar ends at byte"), ("gone", "shard-000000.tar")])
def test_a_file_that_shrinks_under_a_reader_gives_words_and_no_crash(how, sentence, folder):
    stream = SequenceStream(ShardedDataset(folder), 16, seed=1)
    stream[0]
    stream.dataset.tar(0)
    with open(folder / "shard-000000.tar", "r+b") as file:
        file.truncate(600)
    if how == "gone":
        (folder / "shard-000000.tar").unlink()
    with pytest.raises(ValueError, match=sentence):
        for i in range(stream.per_epoch):
            stream[i]
