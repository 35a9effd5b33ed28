"""A checkpoint read at one layout and written at once is the same checkpoint, to the last bit, whatever partitions it.

Files hold boxes of global tensors. So reading and writing exactly at every layout is resharding exactly between any two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.parallel.conftest import START

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ZeRO-0": (2, {"optimizer": {"zero_stage": 0}}),
    "ZeRO-1": (2, {}),
    "ZeRO-2": (2, {"optimizer": {"zero_stage": 2}}),
    "ZeRO-3": (2, {"optimizer": {"zero_stage": 3}}),
    "ZeRO-3, bf16, tied": (4, {"optimizer": {"zero_stage": 3}, "train": {"precision": "bf16"}, "model": {"tie_embeddings": True}}),
    "ZeRO-3, TP2": (4, {"optimizer": {"zero_stage": 3}, "parallel": {"tensor": 2}}),
    "Megatron": (2, {"optimizer": {"backend": "megatron"}}),
    "Megatron, PP2, weights gathered late": (
        4,
        {
            "optimizer": {"backend": "megatron", "overlap_gradients": True, "overlap_parameters": True},
            "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        },
    ),
}


def read_and_write(raw: dict[str, Any], root: str) -> None:
    """Resume a run and save what it holds under another root, without a step between."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, checkpoints = build_trainer(config, groups)
        assert checkpoints.resume(trainer)
        checkpoints.root, checkpoints.saved_step = Path(root) / "checkpoints", -1
        checkpoints.save(trainer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reading_and_writing_keeps_every_bit(name: str, tmp_path: Path, workers: Any, started: Any) -> None:
    size, sections = LAYOUTS[name]
    raw = started(f"reshard_{name.replace(' ', '_')}", **sections)
    workers(size).run(read_and_write, raw, str(tmp_path))
    before, after = runs.weights(Path(raw["run_dir"]), START), runs.weights(tmp_path, START)
    assert runs.largest_difference(before, after, "")[0] == 0.0
    assert any(tensor.abs().max() > 0 for key, tensor in before.items() if key.startswith("exp_avg_sq."))
