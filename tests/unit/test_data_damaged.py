"""Damaged and missing shards: stop by default; by option they are left out, once, and the order stays exact."""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from swax_megatron.config import from_dict
from swax_megatron.data.mixture import Mixture
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.storage import Reader
from swax_megatron.data.stream import SequenceStream
from swax_megatron.errors import RunError
from swax_megatron.feed import Feed
from swax_megatron.sources import build_mixture
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


def read_all(stream: SequenceStream) -> None:
    for i in range(stream.per_epoch):
        stream[i]


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx"])
def test_a_flipped_byte_stops_the_reader_before_it_is_used(name, folder):
    damage(folder, 1, "flipped")
    if name.endswith("idx"):
        damage(folder, 1, "flipped")  # back
        index = bytearray((folder / name).read_bytes())
        index[-16] ^= 1  # the last document begins one id away: the index does not contradict itself
        (folder / name).write_bytes(index)
    stream = SequenceStream(ShardedDataset(folder), 16, seed=1)
    with pytest.raises(ValueError, match=f"{name} is damaged: its sha256 is not the manifest's; copy the data set again"):
        read_all(stream)
    read_all(SequenceStream(ShardedDataset(folder, "size"), 16, seed=1))  # told so: sizes alone


def test_every_file_is_hashed_once_by_the_threads_that_read(folder, monkeypatch):
    hashed: Counter = Counter()
    sha256 = Reader.sha256
    monkeypatch.setattr(Reader, "sha256", lambda self: hashed.update([Path(self.name).name]) or sha256(self))
    dataset = ShardedDataset(folder, max_open_shards=1)
    assert not hashed
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: dataset.tar(number % len(dataset.shards)), range(200)))
    read_all(SequenceStream(dataset, 16, seed=1))
    assert hashed == {name: 1 for entry in dataset.shards for name in (entry["file"], entry["index"])}


def test_a_damaged_shard_ends_the_run_and_can_be_left_out_by_name(folder, tmp_path, caplog):
    damage(folder, 1, "flipped")
    raw = {"model": {"vocab_size": 300}, "data": {"train": [{"path": str(folder)}], "sequence_length": 16, "cache": str(tmp_path)}}
    config = from_dict(raw)
    groups = SimpleNamespace(replicas=1, replica=0, context=None, context_size=1, device=torch.device("cpu"), data=None)

    def train(steps: int) -> dict:
        data = build_mixture(config, config.data.train, "train", 1)
        feed, state = Feed(config, groups, data), data.initial_state()
        for step in range(steps):
            _, state, _ = feed.take(state, step)
        feed.read(data.plan(state, 4)[0], data)
        feed.close()
        return data.state_to_json(state)

    config.train.steps = 30
    with pytest.raises(RunError, match="shard-000001.tar is damaged: its sha256 is not the manifest's; copy the data set again"):
        train(30)
    with pytest.raises(RunError, match="data cannot be read .*shard-000001.tar is damaged"):
        data = build_mixture(config, config.data.train, "train", 1)
        Feed(config, groups, data).read(data.plan(data.initial_state(), 400)[0], data)
    config.data.train[0].skip_shards = ["shard-000001.tar"]
    caplog.set_level("WARNING")
    saved = train(30)
    assert saved["sources"]["set"]["skipped"] == ["shard-000001.tar"]
    assert "shard shard-000001.tar is left out: named in skip_shards" in caplog.text and "1 shards left out, " in caplog.text
    damage(folder, 1, "flipped")  # mended: what the run left out stays out, named or not
    config.data.train[0].skip_shards = []
    data = build_mixture(config, config.data.train, "train", 1)
    state = data.state_from_json(saved)
    assert data.state_to_json(state) == saved
    config.data.train[0].skip_shards = ["shard-000002.tar"]
    with pytest.raises(ValueError, match="source 'set' lost shard-000002.tar since the checkpoint .named in skip_shards.*be continued"):
        build_mixture(config, config.data.train, "train", 1).state_from_json(saved)
    config.data.train[0].skip_shards = ["shard-000099.tar"]
    with pytest.raises(ValueError, match="manifest.json lists no shard shard-000099.tar, which was to be skipped"):
        build_mixture(config, config.data.train, "train", 1)


def test_a_disk_s_error_names_the_file(folder):
    reader = Reader(os.open(folder, os.O_RDONLY), "web/shard-000000.tar")  # reading a folder fails as a broken disk does
    with pytest.raises(OSError, match="web/shard-000000.tar"):
        reader.read_into(0, np.empty(8, np.uint8))
    with pytest.raises(OSError, match="web/shard-000000.tar"):
        reader.sha256()


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
