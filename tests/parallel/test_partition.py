"""What a rank keeps at every stage of ZeRO, and the offloaded update's arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.parallel.conftest import END
from tests.parallel.matrix import OPTIMIZER
from tests.parallel.test_parity import compare


def elements(tensors: Iterable[torch.Tensor | None]) -> int:
    """Elements of the storages behind some tensors, each counted once."""
    storages = ((each.untyped_storage(), each.element_size()) for each in tensors if each is not None)
    return sum({storage.data_ptr(): storage.nbytes() // size for storage, size in storages}.values())


def kept(raw: dict[str, Any]) -> dict[str, int]:
    """Elements on this rank: masters, gradients between two microbatches, weights between two steps; and of the whole model."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        backend, zero = trainer.backend, trainer.backend._zero
        (chunk,) = backend.chunks
        parameters = list(chunk.parameters())
        gradients: list[int] = []

        def count_gradients(*_: object) -> None:
            if config.optimizer.zero_stage == 3:
                partitioned = [zero.grad_partitions_flat_buffer]
            else:
                lists = [*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()]
                partitioned = [tensor for each in lists if each is not None for tensor in each]
            whole = [tensor for each in parameters for tensor in (each.grad, getattr(each, "grad_accum", None))]
            gradients.append(elements([*whole, *partitioned]))

        chunk.register_forward_pre_hook(count_gradients)
        trainer.train_step()
        trainer.feed.close()
        weights = [each.data for each in parameters if each.numel()]
        if config.optimizer.zero_stage == 3:
            weights.append(zero.lp_param_buffer)  # this rank's ranges of all parameters
        return {
            "masters": elements(backend._flat_masters()),
            "gradients": gradients[1],
            "weights": elements(weights),
            "whole": sum(int(getattr(each, "ds_numel", each.numel())) for each in parameters),
        }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_rank_keeps(stage: int, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """bf16, two ranks. Half of everything that the stage partitions (padding and small weights, kept whole, are a few percent)."""
    raw = runs.small_config(corpus, tmp_path, optimizer={"zero_stage": stage}, train={"precision": "bf16"})
    for found in workers(2).run(kept, raw):
        for what, first in (("masters", 1), ("gradients", 2), ("weights", 3)):
            share = 0.5 if stage >= first else 1.0
            assert found[what] == pytest.approx(share * found["whole"], rel=0.1), (what, found)


def step_after_one_given_up(raw: dict[str, Any], give_up: bool) -> dict[str, float]:
    """The first step's metrics; give_up: after another pass over the batch whose gradients nobody used."""
    from swax_megatron.build import build_trainer
    from swax_megatron.execution import Pass, run_microbatches

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        if give_up:
            plan, _ = trainer.data.plan(trainer.state.data, config.train.global_batch_size)
            batches = trainer.load_microbatches(plan)
            trainer.backend.zero_grad(len(batches))
            run_microbatches(Pass(config, groups, trainer.backend.chunks, trainer.windows.layers(0)), batches, backward=True)
        metrics = trainer.train_step().metrics
        trainer.feed.close()
        return {name: metrics[name] for name in ("loss/train", "optim/grad_norm")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["zero0", "zero1", "zero1-overlap", "zero2", "zero3", "megatron-overlap-both"])
def test_nothing_stays_of_a_step_given_up(optimizer: str, precision: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = runs.small_config(corpus, tmp_path, optimizer=OPTIMIZER[optimizer], train={"precision": precision})
    expected, found = (workers(2).run(step_after_one_given_up, raw, give_up)[0] for give_up in (False, True))
    assert found == expected


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
