"""Spikes and gradients that are not finite: the update left out, the way back, the stop; and all of it resumed exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from swax_megatron.data.mixture import StreamState
from swax_megatron.resilience.spikes import GuardState
from swax_megatron.state import TrainState
from tests import runs
from tests.faults import jobs
from tests.resume.test_resume import forget_after

STEPS = 8


def test_a_rare_window_is_no_spike() -> None:
    """The long window's losses lie far below the short one's; each is compared with its own."""
    guard = GuardState()
    for step in range(60):
        guard = guard.accepted("8", 5.0 + 0.01 * (step % 7), 32)
        if step % 20 == 0:
            guard = guard.accepted("512", 2.0 + 0.01 * (step % 3), 32)
    assert len(guard.losses["8"]) == 32
    assert abs(guard.score("8", 5.03, 16)) < 1.5
    assert guard.score("8", 6.0, 16) > 10
    assert guard.score("512", 2.5, 3) > 10, "and a spike of the rare window is one, though every step of the other has a higher loss"
    assert guard.score("512", 5.0, 16) == 0.0, "three losses are no statistics"
    assert guard.score("64", 50.0, 2) == 0.0


def test_near_zero_a_loss_far_above_its_median_is_no_spike() -> None:
    """A small task almost learned: 0.02 and now and then 0.1; a jump of 1 nat still is a spike."""
    guard = GuardState()
    for step in range(50):
        guard = guard.accepted("4", 0.02 + 0.0005 * (step % 5), 50)
    assert guard.score("4", 0.12, 10) < 10 < guard.score("4", 1.0, 10)


def test_state_survives_json_and_counts_updates() -> None:
    import json

    guard = GuardState().accepted("8", 1 / 3, 4).refused(3).refused(4).refused(6)
    assert [guard.streak(step) for step in (3, 4, 5, 6, 7)] == [0, 0, 0, 1, 0]
    assert GuardState((), (3, 4, 5)).streak(5) == 3
    assert TrainState(10, 0, StreamState(0, (0,)), guard).updates == 7
    read = GuardState.from_json(json.loads(json.dumps(guard.to_json())))
    assert read == guard
    assert GuardState.from_json(None) == GuardState()


def nan(corpus: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    resilience = {"fault": "nan", "fault_rank": 1, "fault_step": 4, **sections.pop("resilience", {})}
    return jobs.config(corpus, run_dir, interval=1, resilience=resilience, **sections)


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2 ZeRO": {"optimizer": {"backend": "zero"}},
    "DP2 ZeRO stage 2": {"optimizer": {"backend": "zero", "zero_stage": 2}},
    "DP2 ZeRO stage 3 bf16": {"optimizer": {"backend": "zero", "zero_stage": 3}, "train": {"precision": "bf16"}},
    "DP2 Megatron's optimizer bf16": {"train": {"precision": "bf16"}},
    "TP2 SP ZeRO bf16": {"optimizer": {"backend": "zero"}, "parallel": {"tensor": 2}, "train": {"precision": "bf16"}},
    "PP2 Megatron's optimizer": {"parallel": {"pipeline": 2}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_gradient_leaves_no_trace(layout: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """A NaN on one rank: every rank leaves the update out, weights and moments stay to the last bit, and a run resumed after
    it goes on as the uninterrupted one (AdamW's count of updates is one less than the steps).
    """
    raw = nan(corpus, tmp_path / "run", **LAYOUTS[layout])
    whole = workers(2).run(runs.train, raw)
    assert whole[0]["loss/train"] == whole[1]["loss/train"] and all(map(math.isfinite, whole[0]["loss/train"]))
    assert not math.isfinite(whole[0]["optim/grad_norm"][4])
    (skip,) = jobs.events(tmp_path / "run", "skip")
    assert (skip["step"], skip["why"]) == (4, "not finite")
    before, after = (runs.weights(tmp_path / "run", step) for step in (4, 5))
    assert runs.largest_difference(before, after, "")[0] == 0.0
    assert runs.largest_difference(after, runs.weights(tmp_path / "run", 6))[0] > 0.0, "the next update is applied"
    expected = runs.weights(tmp_path / "run", STEPS)
    forget_after(tmp_path / "run", 6)
    resumed = workers(2).run(runs.train, raw)[0]
    assert resumed["loss/train"] == whole[0]["loss/train"][6:]
    assert runs.largest_difference(runs.weights(tmp_path / "run", STEPS), expected, "")[0] == 0.0


def test_both_optimizers_leave_out_the_same(corpus: Path, tmp_path: Path, workers: Any) -> None:
    zero = workers(2).run(runs.train, nan(corpus, tmp_path / "zero", optimizer={"backend": "zero"}))[0]
    megatron = workers(2).run(runs.train, nan(corpus, tmp_path / "megatron"))[0]
    assert zero["loss/train"] == pytest.approx(megatron["loss/train"], abs=2e-5)


def test_budget_of_skips(corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = nan(corpus, tmp_path / "run", resilience={"fault_steps": 3, "max_skips": 2, "spike_patience": 0})
    with pytest.raises(AssertionError, match="RunError: step 6: 3 updates were left out, more than resilience.max_skips=2"):
        workers(2).run(runs.train, raw)


SPIKE = {
    "fault": "spike",
    "fault_rank": 1,
    "fault_step": 9,
    "fault_steps": 3,
    "spike_minimum": 2,
    "spike_threshold": 20.0,
    "spike_patience": 3,
}
ROWS = 4  # of a global batch


def spike(corpus: Path, run_dir: Path) -> dict[str, Any]:
    return jobs.config(corpus, run_dir, steps=15, interval=2, resilience=SPIKE, window={"windows": [23], "probabilities": [1.0]})


def test_a_spike_that_stays_goes_back_and_jumps_over_the_data(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Spikes at steps 9, 10, 11: each left out; then back to step 8, whose next batch is the 13th. The same ends a run that
    was killed after the rewind, and one that was told to forget its last checkpoints.
    """
    raw = spike(corpus, tmp_path / "run")
    workers(2).run(runs.train, raw)
    assert [event["step"] for event in jobs.events(tmp_path / "run", "skip")] == [9, 10, 11]
    (rewind,) = jobs.events(tmp_path / "run", "rewind")
    assert (rewind["step"], rewind["to"]) == (11, 8)
    assert (rewind["first_sample"], rewind["end_sample"]) == (8 * ROWS, 12 * ROWS)
    lines = jobs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(15)), "no step is missing or told twice"
    assert [line["data/tokens_seen"] for line in lines] == [ROWS * runs.SEQUENCE_LENGTH * (step + 1) for step in range(15)]
    expected = runs.weights(tmp_path / "run", 15)
    jumped = workers(2).run(targets_of_samples, raw, 12 * ROWS, 7)[0]
    assert [line["data/targets"] for line in lines[8:]] == jumped, "the batches after the jump are those of the pure order"

    forget_after(tmp_path / "run", 8)  # killed after the rewind: its checkpoint knows the jump
    workers(2).run(runs.train, raw)
    assert runs.largest_difference(runs.weights(tmp_path / "run", 15), expected, "")[0] == 0.0
    assert len(jobs.events(tmp_path / "run", "rewind")) == 1


def targets_of_samples(raw: dict[str, Any], sample: int, batches: int) -> list[float]:
    """Number of targets of the global batches from a sample on, straight from the mixture."""
    from swax_megatron.config import from_dict
    from swax_megatron.data.packing import pack
    from swax_megatron.sources import build_mixture

    config = from_dict(raw)
    mixture = build_mixture(config, config.data.train, "train", config.train.data_seed)
    _, state = mixture.plan(mixture.initial_state(), sample)
    found = []
    for _ in range(batches):
        plan, state = mixture.plan(state, config.train.global_batch_size)
        batch = mixture.load(plan)
        packed = pack(batch.ids_bt1, batch.mask_bt1, mixture.streams[0].dataset.eos_id, config.model.document_boundary)
        found.append(float(packed.loss_mask_bt.sum()))
    return found


def test_budget_of_rewinds(corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = spike(corpus, tmp_path / "run")
    raw["resilience"] = {**SPIKE, "max_rewinds": 0}
    with pytest.raises(AssertionError, match="RunError: step 11: 3 updates in a row were left out and the run went back 0 times"):
        workers(2).run(runs.train, raw)
