"""Every layout computes the same run: losses, gradient norms, weights and moments against one process.

All start from one checkpoint saved by one process (so each case also reads it resharded) with packed documents, uneven
loss masks, two sources, a stochastic window and M and S layers. The combinations come from tests/parallel/matrix.py.

Tolerances, fp32: a layout changes nothing but the order of sums (over tensor-parallel shards, microbatches and ranks), so
losses near 5 differ by a few units in the last place (4.8e-7 each), gradient norms near 3 by a few as well, and weights by
that noise times the learning rate over AdamW's eps. A gradient that is lost, doubled or averaged wrongly moves the norm by
1e-2 and weights by 1e-4 and more.

bf16: where values are rounded to 8 bits (relative 4e-3 an operation) depends on three things: the tensor-parallel layout,
whose ranks round partial sums; the micro-batch; and whether a pipeline parts a tied embedding's two gradients, which are
then added in fp32. Small models feel that: one process itself is 8 percent off its fp32 gradient norm. So a combination must
equal, within the tolerances of fp32, the plain run that shares these three, and that plain run one process, within bf16's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.parallel import matrix
from tests.parallel.conftest import END, START
from tests.workers import Workers

TP2_SP, MEGATRON = {"tensor": 2}, {"backend": "megatron"}


@dataclass(frozen=True)
class Tolerance:
    """Largest differences: absolute, but of the gradient norm relative."""

    loss: float
    grad_norm: float
    weight: float
    moment: float


FP32, BF16 = Tolerance(5e-6, 1e-5, 5e-6, 5e-5), Tolerance(1e-2, 0.1, 4e-3, 1e-2)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one microbatch of the whole batch": (1, {"train": {"micro_batch_size": 4}}),
    "recompute selective": (1, {"train": {"recompute": "selective"}}),
    "recompute full": (1, {"train": {"recompute": "full"}}),
    "Megatron's optimizer": (1, {"optimizer": MEGATRON}),
    "all logits at once": (1, {"train": {"loss_chunk": 0}}),
    "TP2 SP": (2, {"parallel": TP2_SP}),
    "DP2 ZeRO-1, microbatches of 2": (2, {"train": {"micro_batch_size": 2}}),
    "DP2 ZeRO-2": (2, {"optimizer": {"zero_stage": 2}}),
    "DP2 ZeRO-3": (2, {"optimizer": {"zero_stage": 3}}),
    "tied PP2": (2, {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}}),
    "tied PP2 Megatron's optimizer": (2, {"parallel": {"pipeline": 2}, "optimizer": MEGATRON, "model": {"tie_embeddings": True}}),
    "TP2 SP DP2 ZeRO-3, tied, recompute full": (
        4,
        {"parallel": TP2_SP, "optimizer": {"zero_stage": 3}, "train": {"recompute": "full"}, "model": {"tie_embeddings": True}},
    ),
}
Run = tuple[dict[str, list[float]], dict]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The combinations of the matrix take seconds to find: only where they are asked for."""
    if "combination" in metafunc.fixturenames:
        whole = metafunc.definition.get_closest_marker("matrix") is not None
        wanted = "matrix" in (marks := metafunc.config.option.markexpr) and "not matrix" not in marks
        cases = matrix.sample() if not whole else matrix.matrix() if wanted else []
        metafunc.parametrize("combination", cases, ids=str)


def execute(workers: Callable[[int], Workers], size: int, raw: dict[str, Any]) -> Run:
    """Run on a pool; histories must be the same on every rank."""
    histories = workers(size).run(runs.train, raw)
    assert all(history == histories[0] for history in histories), "ranks report different metrics"
    return histories[0], runs.weights(Path(raw["run_dir"]), END)


def compare(run: Run, reference: Run, within: Tolerance = FP32) -> None:
    (history, tensors), (expected, expected_tensors) = run, reference
    assert history["first_step"] == [START]
    assert history["window/size"] == expected["window/size"] and history["data/targets"] == expected["data/targets"]
    assert history["loss/train"] == pytest.approx(expected["loss/train"], abs=within.loss, rel=0)
    assert history["loss/validation"] == pytest.approx(expected["loss/validation"], abs=within.loss, rel=0)
    assert history["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=within.grad_norm, abs=0)
    for prefix, bound in (("param.", within.weight), ("exp_avg.", within.moment), ("exp_avg_sq.", within.moment)):
        difference, name = runs.largest_difference(tensors, expected_tensors, prefix)
        assert difference <= bound, f"{name} differs by {difference:.2e}"


@pytest.fixture(scope="module")
def reference(workers: Callable[[int], Workers], started: Callable) -> Callable[..., Run]:
    """reference(model fields): the run of one process; with plain fields of bf16, theirs, compared with one process itself."""
    made: dict[str, Run] = {}

    def get(model: dict[str, Any], precision: str = "fp32", parallel: dict[str, Any] | None = None, rows: int = 1) -> Run:
        parallel = parallel or {}
        key = repr((sorted(model.items()), precision, sorted(parallel.items()), rows))
        if key not in made:
            train = {"precision": precision, "micro_batch_size": rows}
            raw = started(f"reference-{len(made)}", model=model, train=train, parallel=parallel)
            size = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
            run = execute(workers, size, raw)
            if size > 1 or rows > 1:
                compare(run, get(model, precision), BF16)
            made[key] = run
        return made[key]

    return get


def check(name: str, size: int, sections: dict[str, Any], workers: Any, started: Any, reference: Any) -> None:
    model, train, parallel = (sections.get(section, {}) for section in ("model", "train", "parallel"))
    if train.get("precision", "fp32") == "fp32":
        expected = reference(model)
    else:
        plain = {field: value for field, value in parallel.items() if field in ("tensor", "sequence")}
        if model.get("tie_embeddings") and parallel.get("pipeline", 1) > 1:
            plain["pipeline"] = 2
        expected = reference(model, "bf16", plain, train.get("micro_batch_size", 1))
    compare(execute(workers, size, started(name.replace(" ", "_"), **sections)), expected)


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    check(name, *CASES[name], workers, started, reference)


def test_sampled_combination_equals_one_process(combination: Any, workers: Any, started: Any, reference: Any) -> None:
    check(str(combination), combination.processes, combination.sections(), workers, started, reference)


@pytest.mark.matrix
def test_combination_equals_one_process(combination: Any, workers: Any, started: Any, reference: Any) -> None:
    tensor = matrix.TENSOR[combination.tensor]["tensor"]
    workers.keep(1, tensor, 2 * tensor, combination.processes)  # of this run and of what it is compared with
    check(str(combination), combination.processes, combination.sections(), workers, started, reference)


def train_without_model_parallel_sums(raw: dict[str, Any]) -> dict[str, list[float]]:
    """A whole run in which no gradient is added up over tensor- or pipeline-parallel ranks before the optimizer's reduction."""
    from swax_megatron.optim.zero import WholeGradients

    real = WholeGradients._reduce_over_model_parallel_ranks
    calls: list[WholeGradients] = []
    WholeGradients._reduce_over_model_parallel_ranks = lambda self: calls.append(self)
    try:
        history = runs.train(raw)
    finally:
        WholeGradients._reduce_over_model_parallel_ranks = real
    assert len(calls) == END - START, "the backend no longer reduces there: lose its gradients elsewhere"
    return history


@pytest.mark.parametrize("name", ["TP2 SP", "tied PP2"])
def test_the_comparison_sees_a_lost_gradient(name: str, workers: Any, started: Any, reference: Any) -> None:
    """Norm weights under sequence parallelism keep a piece of the sequence's gradient, tied tables that of their own stage:
    the first loss is still right, and the run is told apart from the reference by its gradient norm or weights.
    """
    size, sections = CASES[name]
    raw = started(f"lost_{name.replace(' ', '_')}", **sections)
    run = workers(size).run(train_without_model_parallel_sums, raw)[0], runs.weights(Path(raw["run_dir"]), END)
    expected = reference(sections.get("model", {}))
    assert run[0]["loss/train"][0] == pytest.approx(expected[0]["loss/train"][0], abs=FP32.loss, rel=0)
    losses = {metric: expected[0][metric] for metric in ("loss/train", "loss/validation")}  # which would tell as well
    with pytest.raises(AssertionError):
        compare(({**run[0], **losses}, run[1]), expected)


def test_the_comparison_sees_another_learning_rate(workers: Any, started: Any, reference: Any) -> None:
    """A run that differs in nothing but a thousandth of the learning rate is told apart from the reference."""
    run = execute(workers, 1, started("slower", optimizer={"learning_rate": 5e-3 * 0.999}))
    with pytest.raises(AssertionError):
        compare(run, reference({}))


def test_bf16_optimizers_agree_to_fp32_rounding(workers: Any, started: Any) -> None:
    """Both accumulate, reduce and update in fp32 and see the same bf16 gradients."""
    bf16 = {"precision": "bf16"}
    zero = execute(workers, 2, started("bf16_zero", train=bf16))[0]
    megatron = execute(workers, 2, started("bf16_megatron", train=bf16, optimizer=MEGATRON))[0]
    assert zero["loss/train"] == pytest.approx(megatron["loss/train"], abs=2e-4)
    assert zero["optim/grad_norm"] == pytest.approx(megatron["optim/grad_norm"], rel=1e-4)
