"""The update in one launch against DeepSpeed's: losses, weights and moments of the same run, one micro-batch a step and several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def train(raw: dict[str, Any], direct: bool) -> tuple[str, dict[str, list[float]]]:
    """A run in a pool's process; the name of the backend's class and the metrics."""
    from swax_megatron.optim import build
    from swax_megatron.optim import direct as module

    serves, made = module.serves, []
    real = build.build_optimizer

    def remember(*arguments: Any) -> Any:
        made.append(real(*arguments))
        return made[-1]

    import swax_megatron.build as whole

    module.serves = serves if direct else lambda *_: False
    whole.build_optimizer = remember
    try:
        return (runs.train(raw), type(made[0]).__name__)[::-1]
    finally:
        module.serves, whole.build_optimizer = serves, real


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
def test_one_launch_updates_as_deepspeed_does(size: int, rows: int, corpus: Path, tmp_path: Path, workers: Any) -> None:
    found = []
    for direct in (True, False):
        raw = runs.small_config(
            corpus,
            tmp_path / str(direct),
            parallel={"tensor": size},
            train={"precision": "bf16", "steps": 5, "global_batch_size": rows},
            kernels={"backend": "auto"},
            checkpoint={"interval": 5},
        )
        name, history = workers(size).run(train, raw, direct)[0]
        assert name == ("DirectUpdate" if direct else "WholeGradients")
        found.append((history, runs.weights(tmp_path / str(direct), 5)))
    (mine, my_weights), (theirs, their_weights) = found
    assert mine["loss/train"] == pytest.approx(theirs["loss/train"], abs=2e-3)
    assert mine["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-2)
    assert runs.largest_difference(my_weights, their_weights)[0] < 1e-3
    for key, moment in their_weights.items():
        if key.startswith("exp_avg"):
            assert float((my_weights[key] - moment).norm()) <= 0.02 * float(moment.norm()) + 1e-9, key
