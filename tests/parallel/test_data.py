"""Ranks agree on what they read."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from swax_megatron.config import from_dict
from swax_megatron.sources import build_mixture
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
    pool: Workers = workers(2)
    first, second = pool.run(open_on_a_rank, {"data": data, "model": {"vocab_size": 300}}, 1)
    assert first == second and first[0] == ["shard-000002.tar"]
