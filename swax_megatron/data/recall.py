"""Rows of multi-query recall: key-value pairs among noise, asked for again after a known number of tokens.

A row of ids (2 is the end of text, ids below 3 are special):

    filler filler KEY VALUE filler filler ... filler filler KEY VALUE ... 2

The first occurrence of a key tells its value, the second asks for it: only that value is a training target. The gap is
the distance in tokens between telling and asking. Data of this kind trains the arms of the experiment on windows, and
every (row number, seed) is one row, so that training and test rows never depend on who generates them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from swax_megatron.randomness import integer

SPECIAL, EOS = 3, 2


@dataclass(frozen=True)
class RecallTask:
    """What rows look like. near: gaps are log-uniform from 2 to near tokens, but for far_fraction of them, uniform from near to length."""

    keys: int = 2048
    values: int = 2048
    fillers: int = 1024
    pairs: int = 24
    length: int = 1024
    near: int = 256
    far_fraction: float = 0.02

    def __post_init__(self) -> None:
        if min(self.keys, self.values, self.fillers, self.pairs) < 1:
            raise ValueError(f"{self}: keys, values, fillers and pairs must be at least 1")
        if self.pairs > self.keys or 4 * self.pairs > self.length:
            raise ValueError(f"pairs={self.pairs}: must not exceed keys={self.keys} and a quarter of length={self.length}")
        if not 4 <= self.near <= self.length or not 0 <= self.far_fraction <= 1:
            raise ValueError(f"near={self.near} must lie between 4 and length={self.length}, far_fraction={self.far_fraction} in 0 to 1")

    @property
    def vocabulary(self) -> int:
        return SPECIAL + self.keys + self.values + self.fillers


@dataclass(frozen=True)
class Row:
    """ids (length,); mask (length,) uint8, 1 where the id is a target; gaps (length,) tokens between telling and asking there, else 0."""

    ids: np.ndarray
    mask: np.ndarray
    gaps: np.ndarray


def make_row(task: RecallTask, seed: int, number: int, gap_range: tuple[int, int] | None = None) -> Row:
    """Row ``number``: a pure function of (task, seed, number). gap_range: [from, to) tokens of every gap, for tests."""
    random = np.random.RandomState(integer("recall", seed, number) % 2**32)  # this generator's draws are the same in every NumPy
    slots = (task.length - 1) // 2  # pairs stand at even places; the last id is the end of text
    ids = SPECIAL + task.keys + task.values + random.randint(0, task.fillers, task.length)
    mask, gaps = np.zeros(task.length, np.uint8), np.zeros(task.length, np.int64)
    free = np.ones(slots, bool)
    keys = SPECIAL + random.permutation(task.keys)[: task.pairs]
    values = SPECIAL + task.keys + random.randint(0, task.values, task.pairs)
    for key, value in zip(keys, values, strict=True):
        for _ in range(20):  # a crowded row holds fewer pairs
            gap = _gap(task, random, gap_range, slots)
            if gap >= slots:
                continue
            told = int(random.randint(0, slots - gap))
            if free[told] and free[told + gap]:
                free[[told, told + gap]] = False
                for slot in (told, told + gap):
                    ids[2 * slot : 2 * slot + 2] = key, value
                answer = 2 * (told + gap) + 1
                mask[answer], gaps[answer] = 1, 2 * gap
                break
    ids[-1] = EOS
    return Row(ids, mask, gaps)


def gap_ranges(length: int) -> list[tuple[int, int]]:
    """Ranges [from, to) of gaps that rows of a length are tested at: [8, 16), [16, 32), ... up to the length."""
    edges = [8]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return list(zip(edges, [*edges[1:], length - 4], strict=True))


def _gap(task: RecallTask, random: np.random.RandomState, gap_range: tuple[int, int] | None, slots: int) -> int:
    """A gap in slots of two tokens."""
    near = task.near // 2
    if gap_range is not None:
        low = max(1, gap_range[0] // 2)
        return int(random.randint(low, max(low + 1, gap_range[1] // 2)))
    if random.random_sample() < task.far_fraction:
        return int(random.randint(near, max(near + 1, slots)))
    return int(math.exp(random.uniform(0, math.log(near))))
