"""Every combination of the layout's axes: refused by validate(), or to be run against one process.

``combinations`` lists the product of the axes, ``refusal`` asks validate(), ``cover`` picks few that stand for all.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from swax_megatron.config import from_dict
from swax_megatron.schema import Config
from swax_megatron.validate import validate
from tests import runs

PROCESSES = 8  # of the largest combinations that are run: a limit of what two cores can do, not of what is supported
BATCHES = (4, 8, 16, 32, 64)  # rows of an update; a combination takes the smallest that fits
LENGTHS = (92, 104, 96)  # of a row; likewise. The first two are no multiples of the mLSTM's chunk
# grouped-query heads that divide over four ranks; a vocabulary whose padding falls on the last of them
MODEL: dict[str, Any] = {"attention_heads": 8, "attention_kv_heads": 4}

TENSOR: dict[str, dict[str, Any]] = {
    "TP1": {"tensor": 1, "sequence": False},
    "TP2": {"tensor": 2, "sequence": False},
    "TP2-SP": {"tensor": 2, "sequence": True},
    "TP4-SP": {"tensor": 4, "sequence": True},
}
PIPELINE: dict[str, dict[str, Any]] = {
    "PP1": {"pipeline": 1},
    "PP2": {"pipeline": 2},
    "PP2-uneven": {"pipeline": 2, "pipeline_layers": [3, 5]},
    "PP2x2": {"pipeline": 2, "virtual_pipeline": 2},
    "PP2x2-uneven": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 3, 2, 2]},
    "PP3": {"pipeline": 3},
    "PP4": {"pipeline": 4},
    "PP4x2": {"pipeline": 4, "virtual_pipeline": 2},
}
CONTEXT = {"CP1": 1, "CP2": 2, "CP4": 4}
DATA = {"DP1": 1, "DP2": 2, "DP4": 4}
OPTIMIZER: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero1-overlap": {"zero_stage": 1, "overlap_gradients": True},
    "zero2": {"zero_stage": 2},
    "zero2-overlap": {"zero_stage": 2, "overlap_gradients": True},
    "zero3": {"zero_stage": 3},
    "zero3-overlap": {"zero_stage": 3, "overlap_gradients": True},
    "megatron": {"backend": "megatron"},
    "megatron-overlap": {"backend": "megatron", "overlap_gradients": True},
    "megatron-overlap-both": {"backend": "megatron", "overlap_gradients": True, "overlap_parameters": True},
}
RECOMPUTE = ("none", "selective", "full")
PRECISION = ("fp32", "bf16")
TIED = {"untied": False, "tied": True}
ROWS = {"mb1": 1, "mb2": 2}
AXES: tuple[Iterable[str], ...] = (TENSOR, PIPELINE, CONTEXT, DATA, OPTIMIZER, ROWS, RECOMPUTE, PRECISION, TIED)


class Combination(NamedTuple):
    """One value of every axis, by name."""

    tensor: str
    pipeline: str
    context: str
    data: str
    optimizer: str
    rows: str
    recompute: str
    precision: str
    tied: str

    def __str__(self) -> str:
        return " ".join(self)

    @property
    def processes(self) -> int:
        return TENSOR[self.tensor]["tensor"] * PIPELINE[self.pipeline]["pipeline"] * CONTEXT[self.context] * DATA[self.data]

    @property
    def layout(self) -> tuple[str, ...]:
        """What validate() looks at; recomputation, precision and tied embeddings go with every layout (a test checks it)."""
        return self[:6]

    @property
    def batch(self) -> int:
        """Rows of an update: microbatches enough to add up, to fill every stage, and to interleave."""
        pipeline = PIPELINE[self.pipeline]
        stages, rows = pipeline["pipeline"], ROWS[self.rows] * DATA[self.data]
        multiple = rows * (stages if "virtual_pipeline" in pipeline else 1)
        return next(size for size in BATCHES if size % multiple == 0 and size // rows >= max(2, stages))

    @property
    def length(self) -> int:
        """Tokens of a row, which its pieces divide."""
        tensor = TENSOR[self.tensor]
        pieces = CONTEXT[self.context] * (tensor["tensor"] if tensor["sequence"] else 1)
        return next(length for length in LENGTHS if length % pieces == 0)

    @property
    def model(self) -> dict[str, Any]:
        return {**MODEL, "tie_embeddings": TIED[self.tied]}

    def sections(self) -> dict[str, dict[str, Any]]:
        """What differs from the configuration of one process (tests/runs.py), for ``small_config``."""
        return {
            "model": self.model,
            "parallel": {**TENSOR[self.tensor], **PIPELINE[self.pipeline], "context": CONTEXT[self.context]},
            "optimizer": OPTIMIZER[self.optimizer],
            "data": {"sequence_length": self.length},
            "train": {
                "micro_batch_size": ROWS[self.rows],
                "global_batch_size": self.batch,
                "recompute": self.recompute,
                "precision": self.precision,
            },
        }


def combinations() -> list[Combination]:
    """The whole product of the axes."""
    return [Combination(*values) for values in itertools.product(*AXES)]


@cache
def _base() -> Config:
    from pathlib import Path

    return from_dict(runs.small_config(Path("corpus"), Path("run"), model=MODEL))


def refusal(combination: Combination) -> str | None:
    """What validate() says against a combination; None where it is supported."""
    sections = {name: replace(getattr(_base(), name), **fields) for name, fields in combination.sections().items()}
    config = replace(_base(), **sections)
    try:
        validate(config, combination.processes, cuda=False)
    except ValueError as error:
        return str(error)
    return None


@cache
def layout_refusal(layout: tuple[str, ...]) -> str | None:
    return refusal(Combination(*layout, "none", "fp32", "untied"))


@cache
def supported(processes: int = PROCESSES) -> list[Combination]:
    """Combinations of at most so many processes that validate() accepts, which is asked once for each layout."""
    small = (each for each in combinations() if each.processes <= processes)
    return [each for each in small if layout_refusal(each.layout) is None]


def cover(candidates: Sequence[Combination], interactions: Iterable[tuple[int, ...]]) -> list[Combination]:
    """Few of the candidates (greedily) that hold every group of values which any candidate holds on the given axes."""
    groups = list(interactions)

    def held(combination: Combination) -> set[tuple]:
        return {(axes, *(combination[axis] for axis in axes)) for axes in groups}

    # in an order of no meaning, so that ties do not favour the first value of every axis
    shuffled = sorted(candidates, key=lambda each: hashlib.blake2b(str(each).encode()).digest())
    holds = [held(candidate) for candidate in shuffled]
    missing: set[tuple] = set().union(*holds)

    def worth(index: int) -> float:
        return len(holds[index] & missing) / (2 + shuffled[index].processes)  # what a run costs

    queue = [(-worth(index), index) for index in range(len(shuffled))]
    heapq.heapify(queue)
    chosen: list[Combination] = []
    while missing:
        promised, index = heapq.heappop(queue)
        if worth(index) < -promised:  # others hold part of it by now; what it is worth never grows
            heapq.heappush(queue, (-worth(index), index))
            continue
        chosen.append(shuffled[index])
        missing -= holds[index]
    return sorted(chosen, key=lambda each: (each.processes, each))


ALONE = [(axis,) for axis in range(len(AXES))]
PAIRS = list(itertools.combinations(range(len(AXES)), 2))
# tensor x pipeline x optimizer and pipeline x context x optimizer: where the ways of reducing gradients meet
LAYOUTS = [(0, 1, 4), (1, 2, 4)]


@cache
def sample() -> list[Combination]:
    """For the ordinary tests: every value of every axis at least once, with two to four processes.

    What is partitioned over data-parallel ranks is looked at where there are some, or under a pipeline, as far as four go.
    """
    return cover([each for each in supported(4) if {"CP2", "CP4", "DP2", "DP4", "TP4-SP"} & set(each) or each.pipeline != "PP1"], ALONE)


@cache
def matrix() -> list[Combination]:
    """For ``make test-matrix``: every supported pair of values, and every supported tensor x pipeline x optimizer and
    pipeline x context x optimizer.

    SWAX_MATRIX=all: every supported combination of at most eight processes (days).
    """
    if os.environ.get("SWAX_MATRIX") == "all":
        return sorted(supported(), key=lambda each: (each.processes, each))
    return cover(supported(), [*PAIRS, *LAYOUTS])


def table() -> list[str]:
    """Rows of docs/parallelism.md: which optimizer goes with which schedule, asked of validate()."""
    schedules = {"no pipeline": "PP1", "1F1B": "PP2", "interleaved": "PP2x2"}
    rows = ["| optimizer | " + " | ".join(schedules) + " |", "|---" * (len(schedules) + 1) + "|"]
    for name, fields in OPTIMIZER.items():
        spelt = ", ".join(f"`{field}={str(value).lower()}`" for field, value in fields.items())
        cells = []
        for pipeline in schedules.values():
            parts = itertools.product(TENSOR, [pipeline], CONTEXT)
            layouts = [Combination(*part, "DP2", name, "mb1", *rest) for part in parts for rest in _FREE]
            verdicts = {refusal(each) is None for each in layouts}
            assert len(verdicts) == 1, f"{name} with {pipeline} depends on more than the schedule: the table needs another column"
            cells.append("yes" if verdicts.pop() else "refused")
        rows.append(f"| {spelt} | " + " | ".join(cells) + " |")
    return rows


_FREE = [("none", "fp32", "untied"), ("full", "bf16", "tied")]  # recomputation, precision and tied embeddings go with every layout
