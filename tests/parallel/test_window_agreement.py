"""The window on real ranks: every layer, microbatch and recomputation gets f(seed, step); a disagreement stops the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from swax_megatron.model.window import WindowSchedule
from tests import runs
from tests.workers import Workers


def train_with_a_stray_rank(raw: dict[str, Any], field: str, value: Any) -> str:
    """Rank 1 runs another schedule; what stopped the run, as this rank tells it."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        if groups.rank == 1:
            section, name = field.split(".")
            setattr(getattr(config, section), name, value)
            trainer.windows = WindowSchedule.from_config(config)
        try:
            trainer.fit()
        except RuntimeError as error:
            return str(error)
        return "no error"


@pytest.mark.parametrize(
    ("field", "value"), [("train.window_seed", 2), ("window.probabilities", [0.4, 0.6]), ("window.windows", [5, 22]), ("train.steps", 5)]
)
def test_disagreement_stops_every_rank(field: str, value: Any, corpus: Path, tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    """Also when the window of the checked step happens to be equal: the schedule's hash is compared as well."""
    raw = runs.small_config(corpus, tmp_path / "run")
    for message in workers(2).run(train_with_a_stray_rank, raw, field, value):
        assert "step 0: ranks disagree on the attention window" in message
        assert "rank 0:" in message and "rank 1:" in message


def record_windows(raw: dict[str, Any]) -> dict[str, list]:
    """Hook the kernels' entry points; (step or 'validation', layer's window) of every call on this rank."""
    from swax_megatron.build import build_trainer
    from swax_megatron.model.layers.swa import mixer

    calls: list[tuple[int, int]] = []
    real = mixer.swa

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)

        def recording(q: Any, k: Any, v: Any, window: int, **named: Any) -> Any:
            calls.append((trainer.state.step, window))
            return real(q, k, v, window, **named)

        mixer.swa = recording
        try:
            result = []
            for _ in range(config.train.steps):
                trainer.train_step()
                result.append(calls[:])
                calls.clear()
            for window in (5, 23):
                validation = next(callback for callback in trainer.callbacks if type(callback).__name__ == "Validation")
                validation.losses(trainer)
                assert {w for _, w in calls} == {5, 23}, window
                calls.clear()
        finally:
            mixer.swa = real
        dist.barrier()
        return {"steps": result, "expected": [trainer.windows.layers(step) for step in range(config.train.steps)]}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_call_gets_the_drawn_window(recompute: str, corpus: Path, tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    """PP2, two virtual chunks a stage, per-layer windows: 2 S layers a rank, 4 microbatches, forward and recomputation."""
    raw = runs.small_config(
        corpus,
        tmp_path / "run",
        parallel={"pipeline": 2, "virtual_pipeline": 2},
        window={"per_layer": True},
        train={"recompute": recompute},
        validation={"interval": 1},
    )
    ranks = workers(2).run(record_windows, raw)
    layers = [[1, 5], [3, 7]]  # global S layers of (MS)x4 on each stage: chunks 0 and 2 of four, chunks 1 and 3
    for rank, report in enumerate(ranks):
        for calls, windows in zip(report["steps"], report["expected"], strict=True):
            expected = sorted(windows[layer] for layer in layers[rank] for _ in range(4 * (1 if recompute == "none" else 2)))
            assert sorted(window for _, window in calls) == expected
