"""Every layout computes the same run: losses, gradient norms, weights and moments against one process.

All start from one checkpoint saved by one process (so each case also reads it resharded) with packed documents, uneven
loss masks, two sources, a stochastic window and M and S layers on every stage.

Tolerances, fp32: a layout changes nothing but the order of sums (over tensor-parallel shards, microbatches and ranks), so
losses near 5 differ by a few units in the last place (4.8e-7 each), gradient norms near 3 by a few as well, and weights by
that noise times the learning rate over AdamW's eps. A gradient that is lost, doubled or averaged wrongly moves the norm by
1e-2 and weights by 1e-4 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.parallel.conftest import END, START
from tests.workers import Workers

LOSS, GRAD_NORM, WEIGHT, MOMENT = 5e-6, 1e-5, 5e-6, 5e-5
TP2, TP2_SP = {"tensor": 2, "sequence": False}, {"tensor": 2}
MEGATRON = {"backend": "megatron"}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one microbatch of the whole batch": (1, {"train": {"micro_batch_size": 4}}),
    "recompute selective": (1, {"train": {"recompute": "selective"}}),
    "recompute full": (1, {"train": {"recompute": "full"}}),
    "Megatron's optimizer": (1, {"optimizer": MEGATRON}),
    "TP2": (2, {"parallel": TP2}),
    "TP2 SP": (2, {"parallel": TP2_SP}),
    "TP2 SP, Megatron's optimizer, recompute selective": (
        2,
        {"parallel": TP2_SP, "optimizer": MEGATRON, "train": {"recompute": "selective"}},
    ),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "PP2 uneven, Megatron's optimizer": (2, {"parallel": {"pipeline": 2, "pipeline_layers": [3, 5]}, "optimizer": MEGATRON}),
    "PP2 interleaved, recompute full": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"recompute": "full"}}),
    "DP2 ZeRO-1": (2, {}),
    "DP2 ZeRO-1, microbatches of 2": (2, {"train": {"micro_batch_size": 2}}),
    "DP2 Megatron's optimizer": (2, {"optimizer": MEGATRON}),
    "PP4": (4, {"parallel": {"pipeline": 4}}),
    "TP2 SP PP2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "TP2 SP DP2 ZeRO-1": (4, {"parallel": TP2_SP}),
}
MATRIX: dict[str, tuple[int, dict[str, Any]]] = {
    "PP3": (3, {"parallel": {"pipeline": 3, "pipeline_layers": [3, 3, 2]}}),
    "DP4 ZeRO-1": (4, {}),
    "DP4 Megatron's optimizer": (4, {"optimizer": MEGATRON}),
    "TP4 SP": (4, {"parallel": {"tensor": 4}, "model": {"attention_kv_heads": 4}}),
    "PP2 DP2 Megatron's optimizer": (4, {"parallel": {"pipeline": 2}, "optimizer": MEGATRON}),
    "PP4 interleaved": (4, {"parallel": {"pipeline": 4, "virtual_pipeline": 2}}),
    "TP2 PP2 recompute full": (4, {"parallel": {**TP2, "pipeline": 2}, "train": {"recompute": "full"}}),
}
TIED: dict[str, tuple[int, dict[str, Any]]] = {
    "tied PP2": (2, {"parallel": {"pipeline": 2}}),
    "tied PP2 Megatron's optimizer": (2, {"parallel": {"pipeline": 2}, "optimizer": MEGATRON}),
    "tied TP2 SP PP2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
}
Run = tuple[dict[str, list[float]], dict]


def execute(workers: Callable[[int], Workers], size: int, raw: dict[str, Any]) -> Run:
    """Run on a pool; histories must be the same on every rank."""
    histories = workers(size).run(runs.train, raw)
    assert all(history == histories[0] for history in histories), "ranks report different metrics"
    return histories[0], runs.weights(Path(raw["run_dir"]), END)


def compare(run: Run, reference: Run) -> None:
    (history, tensors), (expected, expected_tensors) = run, reference
    assert history["first_step"] == [START]
    assert history["window/size"] == expected["window/size"] and history["data/targets"] == expected["data/targets"]
    assert history["loss/train"] == pytest.approx(expected["loss/train"], abs=LOSS, rel=0)
    assert history["loss/validation"] == pytest.approx(expected["loss/validation"], abs=LOSS, rel=0)
    assert history["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=GRAD_NORM, abs=0)
    for prefix, bound in (("param.", WEIGHT), ("exp_avg.", MOMENT), ("exp_avg_sq.", MOMENT)):
        difference, name = runs.largest_difference(tensors, expected_tensors, prefix)
        assert difference <= bound, f"{name} differs by {difference:.2e}"


@pytest.fixture(scope="module")
def reference(workers: Callable[[int], Workers], started: Callable) -> Callable[[dict[str, Any]], Run]:
    """reference(model fields): the run of one process, made once for each model."""
    made: dict[str, Run] = {}

    def get(model: dict[str, Any]) -> Run:
        key = repr(sorted(model.items()))
        if key not in made:
            made[key] = execute(workers, 1, started(f"reference-{len(made)}", model=model))
        return made[key]

    return get


def check(name: str, size: int, sections: dict[str, Any], workers: Any, started: Any, reference: Any) -> None:
    expected = reference(sections.get("model", {}))
    compare(execute(workers, size, started(name.replace(" ", "_"), **sections)), expected)


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    check(name, *CASES[name], workers, started, reference)


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_equal_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    size, sections = TIED[name]
    check(name, size, {**sections, "model": {"tie_embeddings": True}}, workers, started, reference)


@pytest.mark.matrix
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_layout_equals_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    check(name, *MATRIX[name], workers, started, reference)


def train_without_model_parallel_sums(raw: dict[str, Any]) -> dict[str, list[float]]:
    """A whole run in which no gradient is added up over tensor- or pipeline-parallel ranks before the optimizer's reduction."""
    from swax_megatron.optim.zero import ZeroBackend

    real = ZeroBackend._reduce_over_model_parallel_ranks
    calls: list[ZeroBackend] = []
    ZeroBackend._reduce_over_model_parallel_ranks = lambda self: calls.append(self)
    try:
        history = runs.train(raw)
    finally:
        ZeroBackend._reduce_over_model_parallel_ranks = real
    assert len(calls) == END - START, "the backend no longer reduces there: lose its gradients elsewhere"
    return history


@pytest.mark.parametrize("name", ["TP2 SP", "tied PP2"])
def test_the_comparison_sees_a_lost_gradient(name: str, workers: Any, started: Any, reference: Any) -> None:
    """Norm weights under sequence parallelism keep a piece of the sequence's gradient, tied tables that of their own stage:
    the first loss is still right, and the run is told apart from the reference by its gradient norm or weights.
    """
    size, sections = {**CASES, **TIED}[name]
    sections = {**sections, "model": {"tie_embeddings": True} if name in TIED else {}}
    raw = started(f"lost_{name.replace(' ', '_')}", **sections)
    run = workers(size).run(train_without_model_parallel_sums, raw)[0], runs.weights(Path(raw["run_dir"]), END)
    expected = reference(sections["model"])
    assert run[0]["loss/train"][0] == pytest.approx(expected[0]["loss/train"][0], abs=LOSS, rel=0)
    losses = {metric: expected[0][metric] for metric in ("loss/train", "loss/validation")}  # which would tell as well
    with pytest.raises(AssertionError):
        compare(({**run[0], **losses}, run[1]), expected)


def test_the_comparison_sees_another_learning_rate(workers: Any, started: Any, reference: Any) -> None:
    """A run that differs in nothing but a thousandth of the learning rate is told apart from the reference."""
    run = execute(workers, 1, started("slower", optimizer={"learning_rate": 5e-3 * 0.999}))
    with pytest.raises(AssertionError):
        compare(run, reference({}))


def test_bf16_layouts_stay_within_bf16_rounding(workers: Any, started: Any) -> None:
    """bf16 weights and activations round differently by layout (8 bits: relative 4e-3 an operation); the two optimizers,
    which both accumulate, reduce and update in fp32, see the same bf16 gradients and agree to fp32 rounding.
    """
    bf16 = {"precision": "bf16"}
    alone = execute(workers, 1, started("bf16", train=bf16))[0]
    zero = execute(workers, 2, started("bf16_zero", train=bf16))[0]
    megatron = execute(workers, 2, started("bf16_megatron", train=bf16, optimizer=MEGATRON))[0]
    tensor = execute(workers, 2, started("bf16_tensor", train=bf16, parallel=TP2_SP))[0]
    assert zero["loss/train"] == pytest.approx(megatron["loss/train"], abs=2e-4)
    assert zero["optim/grad_norm"] == pytest.approx(megatron["optim/grad_norm"], rel=1e-4)
    for other in (zero, tensor):
        assert other["loss/train"] == pytest.approx(alone["loss/train"], abs=2e-2)
