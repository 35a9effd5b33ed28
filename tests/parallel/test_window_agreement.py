"""The window on real ranks: every layer, microbatch and recomputation gets f(seed, step); a disagreement stops the run."""

from __future__ import annotations

from collections import Counter
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


LAYERS = [[1, 5], [3, 7]]  # global S layers of (MS)x4 by stage: the second layer of chunks 0 and 2 of four, of chunks 1 and 3


def record_windows(raw: dict[str, Any]) -> dict[str, Any]:
    """What every attention core of this rank is called with: (step, global layer, window) of training, by step; and of
    validation (layer, window), summed loss and targets of every pass.

    The layer is told by where the module stands in this rank's chunks, not by what the module takes itself for.
    """
    from swax_megatron.build import build_trainer
    from swax_megatron.callbacks import validation
    from swax_megatron.model.layers.swa import mixer

    calls: list[tuple[int, int, int]] = []
    running: list[int] = []
    passes: list[tuple[Counter, float, float]] = []
    swa, core, run_microbatches = mixer.swa, mixer.AttentionMixer.core, validation.run_microbatches

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        modules = [module for chunk in trainer.backend.chunks for module in chunk.modules() if isinstance(module, mixer.AttentionMixer)]
        layer_of = dict(zip(map(id, modules), LAYERS[groups.rank], strict=True))

        def recording_core(self: Any, *arguments: Any) -> Any:
            running.append(layer_of[id(self)])
            try:
                return core(self, *arguments)
            finally:
                running.pop()

        def recording_swa(q: Any, k: Any, v: Any, window: int, **named: Any) -> Any:
            calls.append((trainer.state.step, running[-1], window))
            return swa(q, k, v, window, **named)

        def recording_pass(*arguments: Any, **named: Any) -> Any:
            calls.clear()
            totals = run_microbatches(*arguments, **named)
            passes.append((Counter((layer, window) for _, layer, window in calls), totals.loss * totals.targets, totals.targets))
            return totals

        mixer.swa, mixer.AttentionMixer.core, validation.run_microbatches = recording_swa, recording_core, recording_pass
        try:
            steps = []
            for _ in range(config.train.steps):
                calls.clear()
                trainer.train_step()
                steps.append(Counter(calls))
            (callback,) = [each for each in trainer.callbacks if isinstance(each, validation.Validation)]
            losses = callback.losses(trainer)
        finally:
            mixer.swa, mixer.AttentionMixer.core, validation.run_microbatches = swa, core, run_microbatches
        dist.barrier()
        schedule = [trainer.windows.layers(step) for step in range(config.train.steps)]
        return {"steps": steps, "schedule": schedule, "losses": losses, "passes": passes}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_call_gets_the_drawn_window(recompute: str, corpus: Path, tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    """PP2, two virtual chunks a stage, per-layer windows: 2 S layers a rank, 4 microbatches, forward and recomputation;
    then validation, where the loss named after a window is that of the passes in which every S layer had that window.
    """
    raw = runs.small_config(
        corpus,
        tmp_path / "run",
        parallel={"pipeline": 2, "virtual_pipeline": 2},
        window={"per_layer": True, "anneal_fraction": 0.25, "anneal_window": 14, "test_window": 40},
        train={"recompute": recompute, "window_seed": 5},
        validation={"interval": 1},
    )
    reports = workers(2).run(record_windows, raw)
    schedule = reports[0]["schedule"]
    assert reports[1]["schedule"] == schedule
    assert len({tuple(windows[layer] for windows in schedule) for layer in (1, 3, 5, 7)}) == 4, "two layers could swap unseen"
    assert set(schedule[3]) == {14}, "the last step is annealed"
    forwards, validation_batches = 4 * (1 if recompute == "none" else 2), 6  # 5 validation rows, filled up for 2 stages
    for rank, report in enumerate(reports):
        for step, (calls, windows) in enumerate(zip(report["steps"], schedule, strict=True)):
            assert calls == {(step, layer, windows[layer]): forwards for layer in LAYERS[rank]}
        losses, passes = report["losses"], report["passes"]
        assert losses == reports[0]["losses"]
        told = {name for name in losses if name.startswith("loss/validation")}
        assert told == {"loss/validation", *(f"loss/validation/window_{window}" for window in (5, 14, 23, 40))}
        assert len({losses[f"loss/validation/window_{window}"] for window in (5, 14, 23, 40)}) == 4, "two windows could swap unseen"
        for window in (5, 14, 23, 40):
            own = [entry for entry in passes if {seen for _, seen in entry[0]} == {window}]
            calls = sum((entry[0] for entry in own), Counter())
            assert calls == {(layer, window): validation_batches for layer in LAYERS[rank]}
            loss = sum(entry[1] for entry in own) / sum(entry[2] for entry in own)
            assert losses[f"loss/validation/window_{window}"] == pytest.approx(loss, rel=1e-12)
        assert len(passes) == 4 * 2, "six microbatches a window in passes of at most a step's four"
        assert losses["loss/validation"] == losses["loss/validation/window_40"]
