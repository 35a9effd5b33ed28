"""Every layout computes the same run: losses, gradient norms, weights and moments against one process.

All start from one checkpoint saved by one process (so each case also reads it resharded) with packed documents, uneven
loss masks, two sources, a stochastic window and M and S layers. The combinations come from tests/parallel/matrix.py.

Tolerances, fp32: a layout changes nothing but the order of sums (over tensor-parallel shards, microbatches and ranks), so
losses near 5 differ by a few units in the last place (4.8e-7 each), gradient norms near 3 by a few as well, and weights by
that noise times the learning rate over AdamW's eps. Moments are compared tensor by tensor, relative to the tensor's own largest
value (those of the gates' biases are a millionth of others). A gradient that is lost, doubled or averaged wrongly moves the
norm by 1e-2, weights by 1e-4 and moments by 1e-2 and more.

bf16: where values are rounded to 8 bits (relative 4e-3 an operation) depends on four things: the tensor-parallel layout,
whose ranks round partial sums; the micro-batch; the pieces of a row; and whether a pipeline parts a tied embedding's two
gradients, which are then added in fp32. A combination must equal, within the tolerances of fp32, the plain run that shares
these four; and that plain run one process in bf16. The latter is asked of the first update, before which both have the same
weights (a second one amplifies whatever the first left): every tensor's gradient, its norm, and the losses. Without tensor
parallelism little is rounded elsewhere: tensors' gradients agree to 1e-2 of their length. With it partial sums of every
projection are, and the gradient as a whole is 3 to 4 percent of its length away, as one bf16 process is 3 to 5 percent away
from fp32; no bound on that comparison can see less. A sum that is missing moves tensors by 50 to 70 percent, and fp32 sees the
rest of the same code. The weight and the bias of an mLSTM gate count as one tensor: the bias's gradient is the sum over all
tokens of terms that nearly cancel, so that alone it may be all rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from swax_megatron.config import from_dict
from tests import runs
from tests.parallel import matrix
from tests.parallel.conftest import END, START
from tests.workers import Workers

TP2_SP, MEGATRON = {"tensor": 2}, {"backend": "megatron"}


@dataclass(frozen=True)
class Tolerance:
    """Largest differences: absolute; of the gradient norm relative, of a moment relative to its tensor's largest value."""

    loss: float
    grad_norm: float
    weight: float
    moment: float


@dataclass(frozen=True)
class Rounding:
    """Largest differences of a first update: of losses, relative of the gradient norm, and of gradients relative to their length."""

    loss: float
    grad_norm: float
    tensor: float  # of each tensor; twice that for the mLSTM's gates
    whole: float  # of all together


# of the validation after the last update in bf16: what a weight that was rounded to the neighbouring number may change (4e-5 seen)
FLIP, MOST_FLIPS = 1e-4, 3
FP32 = Tolerance(2.5e-6, 5e-6, 2.5e-6, 5e-5)
BF16, BF16_TENSOR = Rounding(2.5e-3, 2e-3, 2e-2, 1e-2), Rounding(5e-3, 2e-2, 0.2, 0.08)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one microbatch of the whole batch": (1, {"train": {"micro_batch_size": 4}}),
    "recompute selective": (1, {"train": {"recompute": "selective"}}),
    "recompute full": (1, {"train": {"recompute": "full"}}),
    "Megatron's optimizer": (1, {"optimizer": MEGATRON}),
    "all logits at once": (1, {"train": {"loss_chunk": 0}}),
    "TP2 SP": (2, {"parallel": TP2_SP}),
    "TP2 SP, overlapped": (2, {"parallel": {**TP2_SP, "overlap": True}}),
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


def compare(run: Run, reference: Run, within: Tolerance = FP32, bf16: bool = False) -> dict[str, float]:
    """Returns the largest differences, by what differs. bf16: weights are rounded masters."""
    (history, tensors), (expected, expected_tensors) = run, reference
    assert history["first_step"] == [START]
    assert history["window/size"] == expected["window/size"] and history["data/targets"] == expected["data/targets"]
    assert history["loss/train"] == pytest.approx(expected["loss/train"], abs=within.loss, rel=0)
    *validations, last = expected["loss/validation"]
    flips = sum(rounded_elsewhere(tensors[name], each) for name, each in expected_tensors.items() if name.startswith("param.")) * bf16
    assert history["loss/validation"][:-1] == pytest.approx(validations, abs=within.loss, rel=0)
    assert history["loss/validation"][-1] == pytest.approx(last, abs=within.loss + min(flips, MOST_FLIPS) * FLIP, rel=0)
    assert history["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=within.grad_norm, abs=0)
    weight, name = runs.largest_difference(tensors, expected_tensors)
    assert weight <= within.weight, f"{name} differs by {weight:.2e}"
    moment = 0.0
    for name in (name for name in expected_tensors if not name.startswith("param.")):
        off = (tensors[name] - expected_tensors[name]).abs().max().item()
        largest = expected_tensors[name].abs().max().item()
        assert off <= within.moment * largest + 1e-12, f"{name} differs by {off:.2e} where its largest value is {largest:.2e}"
        moment = max(moment, off / max(largest, 1e-30))
    losses = [(history[name], expected[name]) for name in ("loss/train", "loss/validation")]
    loss = max(abs(a - b) for pair in losses for a, b in zip(*pair, strict=True))
    norms = zip(history["optim/grad_norm"], expected["optim/grad_norm"], strict=True)
    return {"loss": loss, "grad_norm": max(abs(a / b - 1.0) for a, b in norms), "weight": weight, "moment": moment}


def rounded_elsewhere(masters: torch.Tensor, expected: torch.Tensor) -> int:
    """How many of them round to other bf16 numbers, though they agree in fp32 within the tolerance."""
    return int((masters.bfloat16() != expected.bfloat16()).sum())


def first_gradients(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The clipped gradient of the first update, tensor by tensor, from the moments before and after it."""
    before, after = (runs.weights(Path(raw["run_dir"]), step) for step in (START, START + 1))
    beta = from_dict(raw).optimizer.beta1
    moments = [name for name in before if name.startswith("exp_avg.")]
    return {name.removeprefix("exp_avg."): (after[name] - beta * before[name]) / (1.0 - beta) for name in moments}


Rounded = tuple[dict[str, list[float]], dict[str, torch.Tensor]]


def _lengths(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor; a gate's weight and bias are one."""
    squares: dict[str, float] = {}
    for name, each in tensors.items():
        of = name.removesuffix(".weight").removesuffix(".bias")
        squares[of] = squares.get(of, 0.0) + each.double().square().sum().item()
    return {name: math.sqrt(square) for name, square in squares.items()}


def compare_rounded(run: Rounded, reference: Rounded, within: Rounding) -> None:
    """Two bf16 runs that round elsewhere, by the first update (see above). A run is its history and its first_gradients."""
    (history, gradients), (expected, expected_gradients) = run, reference
    assert history["window/size"] == expected["window/size"] and history["data/targets"] == expected["data/targets"]
    for name in ("loss/train", "loss/validation"):
        assert history[name] == pytest.approx(expected[name], abs=within.loss, rel=0)
    assert history["optim/grad_norm"][0] == pytest.approx(expected["optim/grad_norm"][0], rel=within.grad_norm, abs=0)
    assert gradients.keys() == expected_gradients.keys()
    length = _lengths(expected_gradients)
    off = _lengths({name: gradients[name] - each for name, each in expected_gradients.items()})
    whole = math.hypot(*off.values()) / math.hypot(*length.values())
    allowed = {name: within.tensor * (2.0 if name.endswith(("igate_proj", "fgate_proj")) else 1.0) for name in off}
    worst = max(off, key=lambda name: off[name] / (length[name] * allowed[name]))
    if os.environ.get("SWAX_SHOW"):
        norm = history["optim/grad_norm"][0] / expected["optim/grad_norm"][0] - 1.0
        print(f"bf16: gradient off by {whole:.1e}, {worst} by {off[worst] / length[worst]:.1e}, norm by {norm:.1e}")
    assert off[worst] <= allowed[worst] * length[worst], f"the gradient of {worst} is off by {off[worst] / length[worst]:.1e} of its length"
    assert whole <= within.whole, f"the gradient is off by {whole:.1e} of its length"


@pytest.fixture(scope="module")
def reference(workers: Callable[[int], Workers], started: Callable) -> Callable[..., Run]:
    """reference(**sections): the plain run that a case must equal; in bf16 it has itself been compared with one process."""
    made: dict[str, tuple[Run, dict[str, torch.Tensor]]] = {}

    def run(sections: dict[str, dict[str, Any]]) -> tuple[Run, dict[str, torch.Tensor]]:
        key = repr(sorted((name, sorted(fields.items())) for name, fields in sections.items()))
        if key not in made:
            bf16 = sections["train"].get("precision") == "bf16"
            raw = started(f"reference-{len(made)}", interval=1 if bf16 else END, **sections)
            parallel = sections.get("parallel", {})
            size = math.prod(parallel.get(field, 1) for field in ("tensor", "pipeline", "context"))
            found = execute(workers, size, raw), first_gradients(raw) if bf16 else {}
            if size > 1 or "micro_batch_size" in sections["train"]:
                train = {field: value for field, value in sections["train"].items() if field != "micro_batch_size"}
                (alone, _), gradients = run({**sections, "parallel": {}, "train": train})
                within = BF16_TENSOR if parallel.get("tensor", 1) > 1 else BF16
                compare_rounded((found[0][0], found[1]), (alone, gradients), within)
            made[key] = found
        return made[key]

    def get(**sections: dict[str, Any]) -> Run:
        model, train, parallel = (sections.get(section, {}) for section in ("model", "train", "parallel"))
        kept = ("global_batch_size", "precision")
        plain: dict[str, Any] = {}
        if train.get("precision") == "bf16":
            kept = (*kept, "micro_batch_size") if train.get("micro_batch_size", 1) > 1 else kept
            plain = {field: parallel[field] for field in ("tensor", "context") if parallel.get(field, 1) > 1}
            if "tensor" in plain:
                plain["sequence"] = parallel.get("sequence", True)
                plain["overlap"] = parallel.get("overlap", False) and sections.get("optimizer", {}).get("zero_stage") != 3
            if model.get("tie_embeddings") and parallel.get("pipeline", 1) > 1:
                plain["pipeline"] = 2
        identity = {"model": model, "data": sections.get("data", {}), "window": sections.get("window", {}), "parallel": plain}
        return run({**identity, "train": {field: train[field] for field in kept if field in train}})[0]

    return get


def check(name: str, size: int, sections: dict[str, Any], workers: Any, started: Any, reference: Any) -> dict[str, float]:
    bf16 = sections.get("train", {}).get("precision") == "bf16"
    return compare(execute(workers, size, started(name.replace(" ", "_"), **sections)), reference(**sections), bf16=bf16)


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    check(name, *CASES[name], workers, started, reference)


def test_sampled_combination_equals_one_process(combination: Any, workers: Any, started: Any, reference: Any, differences: Any) -> None:
    found = check(str(combination), combination.processes, combination.sections(), workers, started, reference)
    differences.setdefault(combination.precision, []).append(found)


@pytest.mark.matrix
def test_combination_equals_one_process(combination: Any, workers: Any, started: Any, reference: Any, differences: Any) -> None:
    shared = matrix.TENSOR[combination.tensor]["tensor"] * matrix.CONTEXT[combination.context]
    workers.keep(1, shared, 2 * shared, combination.processes)  # of this run and of what it is compared with
    found = check(str(combination), combination.processes, combination.sections(), workers, started, reference)
    differences.setdefault(combination.precision, []).append(found)


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
    expected = reference(**sections)
    assert run[0]["loss/train"][0] == pytest.approx(expected[0]["loss/train"][0], abs=FP32.loss, rel=0)
    losses = {metric: expected[0][metric] for metric in ("loss/train", "loss/validation")}  # which would tell as well
    with pytest.raises(AssertionError):
        compare(({**run[0], **losses}, run[1]), expected)


def test_the_comparison_sees_another_learning_rate(workers: Any, started: Any, reference: Any) -> None:
    """A run that differs in nothing but a thousandth of the learning rate is told apart from the reference."""
    run = execute(workers, 1, started("slower", optimizer={"learning_rate": 5e-3 * 0.999}))
    with pytest.raises(AssertionError):
        compare(run, reference())


def test_the_comparison_sees_another_second_moment(workers: Any, started: Any, reference: Any) -> None:
    """A run that differs in nothing but beta2 by a hundredth is told apart by the second moments themselves."""
    run = execute(workers, 1, started("longer", optimizer={"beta2": 0.95 * 0.99}))
    history, tensors = reference()
    moments = {name: tensor for name, tensor in run[1].items() if name.startswith("exp_avg_sq.")}
    with pytest.raises(AssertionError, match="exp_avg_sq"):
        compare((history, {**tensors, **moments}), (history, tensors))


def test_the_comparison_of_bf16_runs_sees_a_lost_gradient(workers: Any, started: Any) -> None:
    """Norm weights that keep the gradient of their piece of the sequence, among all that tensor parallelism rounds elsewhere."""
    bf16 = {"precision": "bf16"}
    found = []
    for name, task, size in (("alone", runs.train, 1), ("whole", runs.train, 2), ("lost", train_without_model_parallel_sums, 2)):
        raw = started(f"bf16_{name}", interval=1, train=bf16, parallel={"tensor": size})
        found.append((workers(size).run(task, raw)[0], first_gradients(raw)))
    alone, whole, (_, lost) = found
    compare_rounded(whole, alone, BF16_TENSOR)
    with pytest.raises(AssertionError, match="the gradient of .*layernorm"):
        compare_rounded((whole[0], lost), alone, BF16_TENSOR)


def test_bf16_optimizers_agree_to_fp32_rounding(workers: Any, started: Any) -> None:
    """Both accumulate, reduce and update in fp32 and see the same bf16 gradients."""
    bf16 = {"precision": "bf16"}
    zero = execute(workers, 2, started("bf16_zero", train=bf16))[0]
    megatron = execute(workers, 2, started("bf16_megatron", train=bf16, optimizer=MEGATRON))[0]
    assert zero["loss/train"] == pytest.approx(megatron["loss/train"], abs=2e-4)
    assert zero["optim/grad_norm"] == pytest.approx(megatron["optim/grad_norm"], rel=1e-4)
