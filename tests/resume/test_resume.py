"""Resuming: bit-equal at the same layout, the same data and nearly the same numbers at another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swax_megatron.checkpoint.store import open_checkpoint
from tests import runs
from tests.workers import Workers, free_port

STEPS, ANNEALED_FROM = 8, 4


def config(corpus: Path, run_dir: Path, steps: int = STEPS, interval: int = 3, **sections: Any) -> dict[str, Any]:
    """Annealed from step 4 of 8 on; a checkpoint at steps 3 and 6 and at the end. Rows begin and end inside documents."""
    sections.setdefault("optimizer", {})
    sections["window"] = {"anneal_fraction": 0.5, "anneal_window": 14, **sections.get("window", {})}
    return runs.small_config(
        corpus,
        run_dir,
        train={"steps": steps, **sections.pop("train", {})},
        checkpoint={"interval": interval, "keep_last": 0, **sections.pop("checkpoint", {})},
        validation={"interval": 4},
        **sections,
    )


def forget_after(run_dir: Path, step: int) -> None:
    """What a run killed after step ``step``'s checkpoint leaves: no later checkpoint."""
    import shutil

    for folder in (run_dir / "checkpoints").iterdir():
        if int(folder.name.split("_")[1]) > step:
            shutil.rmtree(folder)


def logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def generators(run_dir: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    """The random generators' states that every rank stored with the last checkpoint."""
    checkpoint = open_checkpoint(run_dir / "checkpoints" / f"step_{STEPS}")
    states = [checkpoint.rank_state(rank) for rank in range(ranks)]
    assert all("cpu_generator" in state for state in states)
    return states


MEGATRON, BF16 = {"optimizer": {"backend": "megatron"}}, {"train": {"precision": "bf16"}}
SAME_LAYOUT: dict[str, dict[str, Any]] = {
    "DP2 ZeRO-1": {"monitor": {"peak_tflops": None}},  # the peak is measured at every start
    "DP2 ZeRO-1 bf16": BF16,
    "DP2 Megatron's optimizer": MEGATRON,
    "DP2 Megatron's optimizer bf16": {**MEGATRON, **BF16},
    "TP2 SP ZeRO-1 bf16": {"parallel": {"tensor": 2}, **BF16},
    "PP2 Megatron's optimizer": {"parallel": {"pipeline": 2}, **MEGATRON},
    "CP2 ZeRO-1": {"parallel": {"context": 2}},
    "DP2 ZeRO-0 bf16": {"optimizer": {"zero_stage": 0}, **BF16},
    "DP2 ZeRO-2 bf16": {"optimizer": {"zero_stage": 2}, **BF16},
    "DP2 ZeRO-3 bf16": {"optimizer": {"zero_stage": 3}, **BF16},
    "DP2 Megatron's optimizer, weights gathered late": {
        "optimizer": {**MEGATRON["optimizer"], "overlap_gradients": True, "overlap_parameters": True}
    },
}


@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_resume_at_the_same_layout_is_bit_equal(name: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Killed before (3), at (4) and after (6) the first annealed step: the same losses, weights, moments and random
    generators, to the last bit.
    """
    raw = config(corpus, tmp_path / "run", interval=1, **SAME_LAYOUT[name])
    whole = workers(2).run(runs.train, raw)[0]
    assert set(whole["window/size"][:ANNEALED_FROM]) == {5, 23} and set(whole["window/size"][ANNEALED_FROM:]) == {14}
    expected, drawn = runs.weights(tmp_path / "run", STEPS), generators(tmp_path / "run", 2)
    lines = logged(tmp_path / "run")
    for killed_at in (6, 4, 3):
        forget_after(tmp_path / "run", killed_at)
        resumed = workers(2).run(runs.train, raw)[0]
        assert resumed["first_step"] == [killed_at]
        for metric in ("loss/train", "optim/grad_norm", "window/size", "data/targets"):
            assert resumed[metric] == whole[metric][killed_at:], metric
        assert resumed["loss/validation"] == whole["loss/validation"][-len(resumed["loss/validation"]) :]
        assert runs.largest_difference(runs.weights(tmp_path / "run", STEPS), expected, "")[0] == 0.0
        for rank, (now, before) in enumerate(zip(generators(tmp_path / "run", 2), drawn, strict=True)):
            assert all(torch.equal(now[key], before[key]) for key in before), f"rank {rank}, killed at {killed_at}"
        again = logged(tmp_path / "run")
        assert [line["step"] for line in again] == list(range(STEPS)), "a step is missing or logged twice"
        assert [line["loss/train"] for line in again] == [line["loss/train"] for line in lines]


def test_resume_at_other_layouts_reads_the_same_data(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Saved at TP2 SP, continued at PP2, at DP2 with the other optimizer, at CP2, and by one process: the batches are exactly the
    same (number of targets, windows, position), the losses within the tolerance of tests/parallel/test_parity.py.
    """
    first = config(corpus, tmp_path / "run", steps=STEPS, parallel={"tensor": 2})
    whole = workers(2).run(runs.train, first)[0]
    layouts: list[tuple[int, dict[str, Any]]] = [
        (2, {"parallel": {"pipeline": 2}}),
        (2, {"optimizer": {"backend": "megatron"}}),
        (2, {"parallel": {"context": 2}}),
        (2, {"optimizer": {"zero_stage": 3}}),
        (1, {}),
        (1, {"train": {"micro_batch_size": 4}}),
    ]
    continues_elsewhere(whole, layouts, corpus, tmp_path, workers)


def test_resume_of_rows_in_pieces_with_whole_rows(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Saved at CP2, continued by one process and at TP2 SP with the other optimizer."""
    whole = workers(2).run(runs.train, config(corpus, tmp_path / "run", parallel={"context": 2}))[0]
    continues_elsewhere(whole, [(1, {}), (2, {"parallel": {"tensor": 2}, **MEGATRON})], corpus, tmp_path, workers)


def continues_elsewhere(whole: dict, layouts: list[tuple[int, dict[str, Any]]], corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Continue the run from step 3 at each layout: the same data and windows, nearly the same losses."""
    for size, sections in layouts:
        forget_after(tmp_path / "run", 3)
        other = workers(size).run(runs.train, config(corpus, tmp_path / "run", **sections))[0]
        assert other["data/targets"] == whole["data/targets"][3:]
        assert other["window/size"] == whole["window/size"][3:]
        assert other["loss/train"] == pytest.approx(whole["loss/train"][3:], abs=2e-5)


def test_an_extended_run_keeps_its_past(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Another total needs a word in the configuration; the windows of the steps done stay as they were drawn."""
    raw = config(corpus, tmp_path / "run", steps=3, window={"anneal_fraction": 0.0}, optimizer={"schedule": "wsd", "decay_fraction": 0.0})
    first = workers(1).run(runs.train, raw)[0]
    raw["train"]["steps"] = 6
    with pytest.raises(AssertionError, match="train.steps"):
        workers(1).run(runs.train, raw)
    raw["checkpoint"]["allow_change"] = ["train.steps"]
    second = workers(1).run(runs.train, raw)[0]
    whole = workers(1).run(runs.train, {**raw, "run_dir": str(tmp_path / "whole")})[0]
    assert first["window/size"] + second["window/size"] == whole["window/size"]
    assert first["loss/train"] + second["loss/train"] == whole["loss/train"]


def launch(raw: dict[str, Any], path: Path, size: int) -> subprocess.Popen:
    """The real program under torchrun, as a user starts it, in a session of its own."""
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = path.with_suffix(".log").open("w")
    return subprocess.Popen(
        [*command, "-m", "swax_megatron.train", str(path)], stdout=log, stderr=log, env=environment, start_new_session=True
    )


def test_killed_with_sigkill_and_resumed(corpus: Path, tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    """SIGKILL of the whole job at a moment of its own choosing; the resumed run ends with the uninterrupted one's bits."""
    raw = config(corpus, tmp_path / "run", steps=STEPS, interval=2)
    whole = workers(2).run(runs.train, {**raw, "run_dir": str(tmp_path / "whole")})[0]
    job = launch(raw, tmp_path / "config.yaml", 2)
    deadline = time.monotonic() + 180
    while not list((tmp_path / "run" / "checkpoints").glob("step_[24]/COMPLETE")):
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "config.log").read_text()[-2000:]
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    resumed = workers(2).run(runs.train, raw)[0]
    first = int(resumed["first_step"][0])
    assert 2 <= first
    assert resumed["loss/train"] == whole["loss/train"][first:]
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(STEPS))
    assert runs.largest_difference(runs.weights(tmp_path / "run", STEPS), runs.weights(tmp_path / "whole", STEPS), "")[0] == 0.0


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"hidden_size": 64, "ffn_hidden_size": 64}}, ["model.hidden_size", "model.ffn_hidden_size"]),
        ({"train": {"data_seed": 2}}, ["train.data_seed"]),
        ({"window": {"windows": [5, 17]}}, ["window"]),
    ],
)
def test_a_conflicting_resume_is_refused(sections: dict[str, Any], named: list[str], corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = config(corpus, tmp_path / "run", steps=3)
    workers(1).run(runs.train, raw)
    with pytest.raises(AssertionError) as caught:
        workers(1).run(runs.train, config(corpus, tmp_path / "run", steps=3, **sections))
    assert "ValueError" in str(caught.value)
    for name in named:
        assert name in str(caught.value)


def test_a_damaged_checkpoint_is_refused_before_training(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """One flipped byte in one file: the program ends with one sentence and exit code 2, and the checkpoint is untouched."""
    raw = config(corpus, tmp_path / "run", steps=3, window={"anneal_fraction": 0.0})
    workers(1).run(runs.train, raw)
    victim = next((tmp_path / "run" / "checkpoints" / "step_3").glob("rank_*0.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    raw["train"]["steps"], raw["checkpoint"]["allow_change"] = 5, ["train.steps"]
    job = launch(raw, tmp_path / "config.yaml", 1)
    job.wait(timeout=180)
    text = (tmp_path / "config.log").read_text()
    assert "error: checkpoint" in text and victim.name in text and "sha256" in text, text[-2000:]
    assert job.returncode != 0
    assert victim.read_bytes() == bytes(content)


def test_generators_survive(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """The state of torch's generator is part of a checkpoint, a rank for itself."""
    assert workers(1).run(draw_around_a_resume, config(corpus, tmp_path / "run", steps=3))[0]


def draw_around_a_resume(raw: dict[str, Any]) -> bool:
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (resolved, groups):
        trainer, checkpoints = build_trainer(resolved, groups)
        trainer.state.step = 1
        torch.manual_seed(5)
        checkpoints.save(trainer)
        drawn = torch.rand(3)
        torch.manual_seed(6)
        checkpoints.resume(trainer)
        return torch.equal(torch.rand(3), drawn)
