"""The plan's memory against the tensors of real training steps, over layouts, recomputation and precision, within six percent."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from swax_megatron.config import from_dict
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.memory import memory
from tests import runs

MODEL = {"hidden_size": 64, "ffn_hidden_size": 176, "pattern": "(MS)x2"}
TOLERANCE = 0.06


def settings(corpus: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    sections = dict(sections)
    sections["train"] = {"micro_batch_size": 2, "global_batch_size": 8, "steps": 2, "loss_chunk": 64, **sections.get("train", {})}
    sections["data"] = {"sequence_length": 192}
    sections["model"] = {**MODEL, **sections.get("model", {})}
    sections["window"] = {"schedule": "fixed", "windows": [23], "probabilities": None, "anneal_fraction": 0.0}
    return runs.small_config(corpus, run_dir, **sections)


def track_as_on_a_gpu(raw: dict[str, Any]) -> tuple[int, int, int]:
    """The same where validate() would refuse for want of a GPU: the host's memory stands for both."""
    real = runs.validate
    runs.validate = partial(real, cuda=True)
    try:
        return track(raw)
    finally:
        runs.validate = real


def track(raw: dict[str, Any]) -> tuple[int, int, int]:
    """On every rank: its stage, bytes between two steps, and the largest number within the second."""
    from swax_megatron.build import build_trainer
    from tests.memory import TensorBytes

    with runs.layout(raw) as (config, groups), TensorBytes() as count:
        trainer, _ = build_trainer(config, groups)
        trainer.train_step()
        gc.collect()
        between, count.peak = count.now, 0
        trainer.train_step()
        return groups.pipeline_rank, between, count.peak


# much weight, few tokens kept: the reduction or the update is the fullest moment (not Megatron's: gloo copies what NCCL reduces in place)
HEAVY = {"model": {"hidden_size": 256, "ffn_hidden_size": 1024}, "train": {"micro_batch_size": 1, "recompute": "full"}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "alone bf16": (1, {"train": {"precision": "bf16"}}),
    "selective": (1, {"train": {"recompute": "selective"}}),
    "full bf16": (1, {"train": {"recompute": "full", "precision": "bf16"}}),
    "TP2 SP": (2, {"parallel": {"tensor": 2}}),
    "TP2 bf16": (2, {"parallel": {"tensor": 2, "sequence": False}, "train": {"precision": "bf16"}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "PP2 full, Megatron's optimizer": (
        2,
        {"parallel": {"pipeline": 2}, "train": {"recompute": "full"}, "optimizer": {"backend": "megatron"}},
    ),
    "PP2 interleaved bf16": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"precision": "bf16"}}),
    "DP2": (2, {}),
    "DP2 ZeRO-2 selective": (2, {"optimizer": {"zero_stage": 2}, "train": {"recompute": "selective"}}),
    "DP2 ZeRO-3 bf16": (2, {"optimizer": {"zero_stage": 3}, "train": {"precision": "bf16"}}),
    "DP2 Megatron's optimizer bf16": (2, {"optimizer": {"backend": "megatron"}, "train": {"precision": "bf16"}}),
    "heavy": (1, HEAVY),
    "heavy DP2 ZeRO-2": (2, {**HEAVY, "optimizer": {"zero_stage": 2}}),
    "heavy DP2 ZeRO-3": (2, {**HEAVY, "optimizer": {"zero_stage": 3}}),
    "heavy DP2": (2, HEAVY),
    "CP2": (2, {"parallel": {"context": 2}}),
    "DP2 offload bf16": (2, {"optimizer": {"offload": True}, "train": {"precision": "bf16"}}),
    "DP2 ZeRO-2 offload": (2, {"optimizer": {"zero_stage": 2, "offload": True}, "train": {"micro_batch_size": 4}}),
    "DP2 ZeRO-3 offload bf16": (2, {"optimizer": {"zero_stage": 3, "offload": True}, "train": {"precision": "bf16"}}),
}


SAMPLE = ("heavy", "full bf16", "TP2 SP", "PP2 interleaved bf16", "DP2 ZeRO-2 selective", "DP2 offload bf16")


def marks(name: str) -> list[Any]:
    return [] if name in SAMPLE else [pytest.mark.matrix]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_the_plan_knows_the_memory_of_a_step(name: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    size, sections = CASES[name]
    raw = settings(corpus, tmp_path, **sections)
    layout = Layout.of(from_dict(raw), size, "reference")
    report = []
    for rank, (stage, between, peak) in enumerate(workers(size).run(track_as_on_a_gpu, raw)):
        expected = memory(layout, stage)
        ratios = between / (expected.resident + expected.host), peak / (expected.total + expected.host)
        report.append((rank, stage, *ratios, between, peak, expected))
    if os.environ.get("SWAX_SHOW"):
        for line in report:
            print(name, "(rank, stage, between, peak of the plan; bytes):", line)
    for rank, stage, between, peak, *_ in report:
        assert between == pytest.approx(1.0, abs=TOLERANCE), f"rank {rank}, stage {stage}, between steps"
        assert peak == pytest.approx(1.0, abs=TOLERANCE), f"rank {rank}, stage {stage}, within a step"
