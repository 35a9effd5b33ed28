"""The trainer in several layouts against one process on one GPU: what tests/gpu/test_nccl.py and test_one_gpu.py share.

Tolerances of losses near 5, over 20 steps. fp32 (torch's default: no TF32 in matrix products): a layout changes nothing but the
order of sums, but on a GPU products of other shapes take other blockings and the embedding's gradient adds with atomics, so the
last bits differ from the first step on and training carries them along: 2e-5. bf16 (8 bits, 4e-3 an operation; tensor-parallel
ranks round partial sums): 3e-2. A missing or doubled sum moves either by 1e-1 within a few steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs

STEPS = 20
BOUND = {"fp32": 2e-5, "bf16": 3e-2}
MEGATRON = {"optimizer": {"backend": "megatron"}}


def settings(corpus: Path, run_dir: Path, precision: str, steps: int = STEPS, interval: int = 0, **sections: Any) -> dict[str, Any]:
    """A run with two sources of packed documents, a stochastic window and validation every ten steps.

    interval: steps between checkpoints
    """
    sections["train"] = {"steps": steps, "precision": precision, **sections.get("train", {})}
    sections["model"] = {"pattern": "(MS)x2", "attention_kv_heads": 4, **sections.get("model", {})}
    checkpoint = {"interval": interval, "keep_last": 0}
    return runs.small_config(corpus, run_dir, checkpoint=checkpoint, validation={"interval": 10}, **sections)


def same(name: str, precision: str, found: dict[str, list[float]], expected: dict[str, list[float]], factor: float = 1.0) -> None:
    """The same batches and windows, and losses within the bound (times ``factor``); prints the largest difference."""
    assert found["window/size"] == expected["window/size"] and found["data/targets"] == expected["data/targets"]
    worst = max(abs(a - b) for a, b in zip(found["loss/train"], expected["loss/train"], strict=True))
    print(f"{name} {precision}: largest loss difference over {len(found['loss/train'])} steps {worst:.1e}")
    assert worst <= factor * BOUND[precision]
    assert found["loss/validation"] == pytest.approx(expected["loss/validation"], abs=factor * BOUND[precision])
