"""The window schedule: golden values, statistics, annealing, layers."""

from __future__ import annotations

import dataclasses

import pytest

from swax_megatron import randomness
from swax_megatron.config import from_dict
from swax_megatron.model.window import WindowSchedule


def schedule(**changes: object) -> WindowSchedule:
    base = WindowSchedule("MSMF", "stochastic", (128, 2048), (0.5, 0.5), 0.1, 2048, False, 1000, 1, 16384)
    return dataclasses.replace(base, **changes)


def test_golden_values() -> None:
    """Changing these changes every run made so far."""
    assert [schedule().window(step) for step in range(12)] == GOLDEN
    assert schedule().fingerprint() == FINGERPRINT


GOLDEN = [2048, 128, 2048, 128, 128, 2048, 2048, 2048, 2048, 128, 2048, 128]
FINGERPRINT = 0x51125EAE7D29309A


def test_pure_in_the_step() -> None:
    forward = [schedule().window(step) for step in range(200)]
    assert forward == [schedule().window(step) for step in reversed(range(200))][::-1]
    assert forward != [schedule(seed=2).window(step) for step in range(200)]


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.75])
def test_frequencies(probability: float) -> None:
    """Within four standard deviations of the binomial."""
    n = 4000
    drawn = sum(schedule(probabilities=(probability, 1 - probability), steps=10 * n).window(step) == 128 for step in range(n))
    assert abs(drawn - n * probability) < 4 * (n * probability * (1 - probability)) ** 0.5


def test_the_draw_is_independent_of_the_data_source() -> None:
    """Chi-squared of window x data source over shared counters: the purposes separate the streams (1 % level: 6.63)."""
    n, table = 4000, [[0, 0], [0, 0]]
    for step in range(n):
        table[randomness.choice((0.5, 0.5), "window", 1, step)][randomness.choice((0.5, 0.5), "mixture-source", 1, step)] += 1
    rows, columns = [sum(row) for row in table], [sum(column) for column in zip(*table, strict=True)]
    chi = sum((table[i][j] - rows[i] * columns[j] / n) ** 2 / (rows[i] * columns[j] / n) for i in (0, 1) for j in (0, 1))
    assert chi < 6.63


@pytest.mark.parametrize(("fraction", "steps", "start"), [(0.1, 1000, 900), (0.1, 15, 14), (0.0, 10, 10), (1.0, 10, 0), (0.3, 10, 7)])
def test_annealing_begins_at_the_ceiling(fraction: float, steps: int, start: int) -> None:
    """ceil((1 - a) * total)"""
    annealed = schedule(anneal_fraction=fraction, steps=steps, anneal_window=77)
    assert annealed.anneal_start == start
    assert all((annealed.window(step) == 77) == (step >= start) for step in range(steps))


def test_fixed_and_ramp() -> None:
    assert {schedule(schedule="fixed", anneal_fraction=0.0).window(step) for step in range(50)} == {128}
    ramp = schedule(schedule="ramp", windows=(128, 512, 2048), anneal_fraction=0.1, steps=10)
    assert [ramp.window(step) for step in range(10)] == [128] * 3 + [512] * 3 + [2048] * 4


def test_layers() -> None:
    assert schedule(schedule="fixed").layers(0) == (128, 128, 128, 16384)  # F sees the whole row
    assert schedule(schedule="fixed", sequence_length=100).layers(0) == (100, 100, 100, 100)
    each = schedule(kinds="S" * 24, per_layer=True)
    assert any(len(set(each.layers(step))) == 2 for step in range(5))
    assert len(set(schedule(kinds="S" * 24).layers(0))) == 1


def test_from_config() -> None:
    config = from_dict({"model": {"pattern": "MS"}, "window": {"windows": [4, 8]}, "data": {"sequence_length": 32}, "train": {"steps": 10}})
    built = WindowSchedule.from_config(config)
    assert built.probabilities == (0.5, 0.5) and built.anneal_window == 8 and built.anneal_start == 9
