"""A run of the data alone, resumed again and again at other layouts: what all its ranks read, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from swax_megatron.batching import batch_rows
from swax_megatron.config import from_dict
from swax_megatron.feed import Feed
from swax_megatron.schema import Config
from swax_megatron.sources import build_mixture
from tests.texts import random_documents, write_ids

NAMES = ("web", "code", "books")
ROWS = (8, 16)  # of the ramp, divisible by every layout below
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]  # data-parallel ranks, rows of a microbatch


def write_sources(folder: Path, documents: int) -> None:
    """Three sources of different sizes, of random ids."""
    for number, name in enumerate(NAMES):
        write_ids(folder / name, random_documents(documents * (number + 1), seed=number, longest=40), shard_bytes=8192)


def config(folder: Path, steps: int, base: str | None = None, **data: object) -> Config:
    """A curriculum that turns sources off and on, a batch that grows."""
    third = steps // 3
    return from_dict(
        {
            "model": {"vocab_size": 300},
            "data": {
                "train": [{"path": f"{base or folder}/{name}"} for name in NAMES],
                "sequence_length": 48,
                "shuffle_tokens": 4000,
                "cache": str(folder / "cache"),
                "curriculum": [
                    {"step": third, "weights": {"web": 0.0, "code": 0.7, "books": 0.3}},
                    {"step": 2 * third, "weights": {"web": 5.0, "code": 0.2, "books": 0.0}},
                ],
                **data,
            },
            "train": {"steps": steps, "global_batch_size": ROWS[1], "batch_ramp": [{"until_step": third + 1, "rows": ROWS[0]}]},
        }
    )


def read(config: Config, ranks: int, micro: int, workers: int, first: int, last: int, saved: dict | None) -> tuple[list, dict]:
    """Steps ``first`` to ``last`` as ``ranks`` ranks read them: [inputs, targets, loss mask, positions] of each, and the state after.

    Every rank opens the data anew and goes on from what the ranks before saved.
    """
    config.train.micro_batch_size, config.data.workers = micro, workers
    parts: list[list] = []
    states = []
    for rank in range(ranks):
        mixture = build_mixture(config, config.data.train, "train", config.train.data_seed)
        state = mixture.initial_state() if saved is None else mixture.state_from_json(json.loads(json.dumps(saved)))
        groups = SimpleNamespace(replicas=ranks, replica=rank, context=None, context_size=1, device=torch.device("cpu"), data=None)
        feed = Feed(config, groups, mixture)
        feed._count = lambda step, mine: mine  # there is no process group here
        steps = []
        for step in range(first, last):
            batches, state, _ = feed.take(state, step)
            fields = ("inputs_bt", "targets_bt", "loss_mask_bt", "positions_bt")
            steps.append([torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in fields])
        feed.close()
        parts.append(steps)
        states.append(mixture.state_to_json(state))
    assert all(each == states[0] for each in states)
    whole = [[np.concatenate([part[step][k] for part in parts]) for k in range(4)] for step in range(last - first)]
    assert [len(step[0]) for step in whole] == [batch_rows(config, step) for step in range(first, last)]
    return whole, states[0]


def torture(folder: Path, steps: int, resumes: int, seed: int, base: str | None = None, **data: object) -> dict:
    """Read all steps at once, then with ``resumes`` interruptions; raises AssertionError where a token differs. Returns the end state."""
    expected, end = read(config(folder, steps, **data), 1, 1, 0, 0, steps, None)
    random = np.random.default_rng(seed)
    cuts = [0, *sorted(random.choice(np.arange(1, steps), resumes, replace=False).tolist()), steps]
    saved = None
    for first, last in zip(cuts, cuts[1:], strict=False):
        ranks, micro = LAYOUTS[random.integers(len(LAYOUTS))]
        found, saved = read(config(folder, steps, base, **data), ranks, micro, int(random.integers(0, 4)), first, last, saved)
        for step, batch in enumerate(found, first):
            assert all((a == b).all() for a, b in zip(batch, expected[step], strict=True)), f"step {step} at {ranks} ranks"
    assert saved == end
    return end
