"""Resumes at changing ranks, workers and microbatches: the same global batches, token by token, none lost and none twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from swax_megatron.data.rows import open_stream
from swax_megatron.data.shards import ShardedDataset
from tests.http_server import serve
from tests.torture import NAMES, config, read, torture, write_sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torture")
    write_sources(path, 300)
    return path


def check_complete(folder: Path, end: dict, batches: list, packing: str) -> None:
    """The rows of all steps are each source's first ``position`` sequences, each exactly once."""
    seen = Counter(row.tobytes() for step in batches for row in np.concatenate([step[0], step[1][:, -1:]], axis=1).astype(np.int64))
    wanted: Counter = Counter()
    for name in NAMES:
        stream = open_stream(ShardedDataset(folder / name), 48, end["seed"], packing, 4000)
        wanted.update(stream[i][0].tobytes() for i in range(end["sources"][name]["position"]))
    assert seen == wanted


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_ten_resumes(packing, folder):
    end = torture(folder, steps=40, resumes=10, seed=1, packing=packing)
    assert end["sample"] == 14 * 8 + 26 * 16 and end["sources"]["web"]["position"] > 0
    batches, _ = read(config(folder, 40, packing=packing), 2, 2, 1, 0, 40, None)
    check_complete(folder, end, batches, packing)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_many_resumes_over_http_with_faults(packing, seed, tmp_path):
    """Several epochs, from a server that fails now and then, through a cache that holds two shuffle blocks of each source."""
    write_sources(tmp_path, 1000)
    with serve(tmp_path) as (url, faults):
        faults.by_name = {f"shard-{n:06d}.tar": ["status", "cut", "flip"][n % 3 :] for n in range(20)}
        end = torture(tmp_path, steps=600, resumes=30, seed=seed, base=url, packing=packing, cache_gib=2e-4)
        assert sum(faults.requests.values()) > 60
    assert end["sources"]["code"]["position"] > end["sources"]["code"]["sequences_per_epoch"]
