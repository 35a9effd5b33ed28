"""What a rank keeps at every stage of ZeRO, and the offloaded update's arithmetic."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.parallel.conftest import END
from tests.parallel.test_parity import compare


def kept(raw: dict[str, Any]) -> dict[str, int]:
    """Elements of masters, of gradients when the last backward pass is over, and of weights between steps, on this rank."""
    from swax_megatron.build import build_trainer
    from swax_megatron.optim import zero

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        backend = trainer.backend
        parameters = list(backend.chunks[0].parameters())
        found: dict[str, int] = {}
        inner, reduce = backend._zero, backend._reduce

        def counted() -> None:
            whole = {tensor.data_ptr(): tensor.numel() for p in parameters for tensor in (p.grad, p.grad_accum) if tensor is not None}
            reduce()
            parts = [tensor for _, tensor in backend._partition_gradients()] if isinstance(backend, zero._ByMicrobatch) else []
            found["gradients"] = sum(whole.values()) + sum(part.numel() for part in parts)

        for parameter in parameters:
            parameter.grad_accum = getattr(parameter, "grad_accum", None)  # stage 3 has none
        backend._reduce = counted
        trainer.train_step()
        found["masters"] = sum(flat.numel() for flat in backend._flat_masters())
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in parameters if tensor.numel()}
        if config.optimizer.zero_stage == 3:
            held[0] = inner.lp_param_buffer.nbytes  # this rank's ranges of all parameters
        found["weight bytes"] = sum(held.values())
        found["whole"] = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)
        return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_rank_keeps(stage: int, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """bf16, two ranks. Half of everything that the stage partitions (padding and small weights, kept whole, are a few percent)."""
    raw = runs.small_config(corpus, tmp_path, optimizer={"zero_stage": stage}, train={"precision": "bf16"})
    for found in workers(2).run(kept, raw):
        half = pytest.approx(found["whole"] / 2, rel=0.1)
        assert found["masters"] == (half if stage >= 1 else pytest.approx(found["whole"], rel=0.01))
        assert found["gradients"] == (half if stage >= 2 else found["whole"])
        weights = (1, 0.15) if stage == 3 else (2, 0.02)  # bytes an element; stage 3 keeps a fraction of small ones beside its half
        assert found["weight bytes"] == pytest.approx(weights[0] * found["whole"], rel=weights[1])


def train_as_on_a_gpu(raw: dict[str, Any]) -> dict[str, list[float]]:
    """A run that validate() would refuse for want of a GPU: the host's memory stands for both."""
    real = runs.validate
    runs.validate = partial(real, cuda=True)
    try:
        return runs.train(raw)
    finally:
        runs.validate = real


@pytest.mark.parametrize(
    ("size", "sections"),
    [
        (2, {"optimizer": {"zero_stage": 1}, "parallel": {"tensor": 2}}),
        (2, {"optimizer": {"zero_stage": 1}, "parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}}),
        (2, {"optimizer": {"zero_stage": 2}}),
        (2, {"optimizer": {"zero_stage": 3}, "train": {"recompute": "full"}}),
    ],
    ids=["stage 1 TP2 SP", "stage 1 PP2 tied", "stage 2", "stage 3"],
)
def test_the_offloaded_update_is_the_same(size: int, sections: dict[str, Any], workers: Any, started: Any) -> None:
    found = []
    for offload in (False, True):
        changed = {**sections, "optimizer": {**sections["optimizer"], "offload": offload}}
        raw = started(f"offload_{offload}", **changed)
        found.append((workers(size).run(train_as_on_a_gpu, raw)[0], runs.weights(Path(raw["run_dir"]), END)))
    compare(found[1], found[0])
