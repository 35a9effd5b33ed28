"""Ranks agree on what they read, and the trainer reads what the configuration says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from swax_megatron.config import from_dict
from swax_megatron.errors import RunError
from swax_megatron.sources import build_mixture
from tests import runs
from tests.texts import random_documents, write_ids
from tests.workers import Workers


def open_on_a_rank(raw: dict, damaged_on: int) -> tuple[list[str], list[int]]:
    """Each rank has a copy of the data of its own; one copy is damaged."""
    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    raw["data"]["train"][0]["path"] = raw["data"]["train"][0]["path"].replace("RANK", str(rank))
    if rank == damaged_on:
        tar = Path(raw["data"]["train"][0]["path"]) / "shard-000002.tar"
        data = bytearray(tar.read_bytes())
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)
    os.environ["LOCAL_RANK"] = "0"  # every rank is the first of its node
    try:
        data = build_mixture(from_dict(raw), from_dict(raw).data.train, "train", 1)
    finally:
        os.environ["LOCAL_RANK"] = str(rank)
    return list(data.streams[0].dataset.skipped), data.streams[0][3][0].tolist()


def test_all_ranks_leave_out_what_one_node_has_lost(tmp_path, workers):
    documents = random_documents(400)
    for rank in range(2):
        write_ids(tmp_path / str(rank) / "set", documents)
    source = {"path": str(tmp_path / "RANK" / "set")}
    data = {"train": [source], "sequence_length": 16, "damaged": "skip", "verify": "sha256", "cache": str(tmp_path)}
    data["packing"] = "best_fit"  # whose rows they count together
    pool: Workers = workers(2)
    first, second = pool.run(open_on_a_rank, {"data": data, "model": {"vocab_size": 300}}, 1)
    assert first == second and first[0] == ["shard-000002.tar"]


def logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_ramp_a_curriculum_and_best_fit_rows_through_the_trainer(corpus, tmp_path, workers):
    """One process that reads between the steps; two that read ahead, stopped after step 3 and gone on as one with other microbatches."""
    data = {"packing": "best_fit", "curriculum": [{"step": 3, "weights": {"a": 0.0, "b": 1.0}}], "shuffle_tokens": 400}
    data["cache"] = str(tmp_path / "cache")
    train = {"steps": 6, "batch_ramp": [{"until_step": 2, "rows": 2}]}

    def config(name: str, threads: int, micro: int, steps: int = 6) -> dict:
        raw = runs.small_config(corpus, tmp_path / name, train={**train, "micro_batch_size": micro, "steps": steps})
        raw["data"] |= {**data, "workers": threads}
        raw["window"]["anneal_fraction"] = raw["optimizer"]["decay_fraction"] = 0.0
        raw["checkpoint"] = {"interval": 3, "allow_change": ["train.steps"]}
        return raw

    workers(1).run(runs.train, config("whole", threads=0, micro=1))
    workers(2).run(runs.train, config("parted", threads=2, micro=1, steps=3))
    workers(1).run(runs.train, config("parted", threads=3, micro=2))
    whole, parted = logged(tmp_path / "whole"), logged(tmp_path / "parted")
    assert [line["data/batch_rows"] for line in whole] == [2, 2, 4, 4, 4, 4]
    for name in ("data/batch_rows", "data/tokens_seen", "data/targets", "data/padding_fraction", "data/epoch/a", "data/epoch/b"):
        assert [line[name] for line in parted] == [line[name] for line in whole], name
    assert [line["loss/train"] for line in parted] == pytest.approx([line["loss/train"] for line in whole], rel=1e-4)
    rows = [sum(line["data/batch_rows"] for line in whole[: step + 1]) for step in range(6)]
    seen = [line["data/tokens_seen"] for line in whole]
    assert all(0.8 * total < tokens / runs.SEQUENCE_LENGTH <= total for total, tokens in zip(rows, seen, strict=True))
    assert seen[-1] < rows[-1] * runs.SEQUENCE_LENGTH  # some of it is padding
    assert whole[2]["data/epoch/a"] == whole[5]["data/epoch/a"] and whole[2]["data/epoch/b"] < whole[5]["data/epoch/b"]
    assert all(0 <= line["time/data_wait_fraction"] <= 1 for line in whole + parted)


def test_damage_that_is_met_while_training_stops_in_words(tmp_path, workers):
    """Reading ahead carries the error to the step that needs the data."""
    write_ids(tmp_path / "a", random_documents(400, vocab_size=200), vocab_size=200, shard_bytes=1 << 20)
    raw = runs.small_config(tmp_path, tmp_path / "run", validation={"interval": 0})
    raw["data"] = {"train": [{"path": str(tmp_path / "a")}], "sequence_length": runs.SEQUENCE_LENGTH}
    told = workers(1).run(train_over_a_cut_file, raw, str(tmp_path / "a" / "shard-000000.tar"))[0]
    assert "step 0: training data cannot be read" in told
    assert "a/shard-000000.tar has 600 bytes where the manifest states" in told


def train_over_a_cut_file(raw: dict, tar: str) -> str:
    """The sentence with which training ends where a file is cut short after it was opened."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        with open(tar, "r+b") as file:
            file.truncate(600)
        try:
            trainer.fit()
        except RunError as error:
            return str(error)
        finally:
            trainer.feed.close()
    return "no error"
