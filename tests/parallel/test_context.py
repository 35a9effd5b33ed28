"""Rows cut over context-parallel ranks compute the run of one process: with every other kind of parallelism, both optimizers,
every recomputation; documents that cross the seams, windows beyond a piece, full-attention layers. Tolerances: test_parity.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.parallel.conftest import END
from tests.parallel.test_parity import BF16, MEGATRON, Run, compare, compare_rounded, execute, first_gradients
from tests.workers import Workers

CP2, CP4 = {"context": 2}, {"context": 4}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
# rows of 92 are cut into pieces of 46 or 23: windows of up to 80 look beyond them, and memory and window cross documents
FAR: dict[str, Any] = {
    "model": {"pattern": "MSMFMSMS", "document_boundary": "carry"},
    "window": {"windows": [5, 80], "per_layer": True},
}
TIED: dict[str, Any] = {"model": {"tie_embeddings": True}}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "CP2, recompute full": (2, {"parallel": CP2, "train": FULL}),
    "CP4, far": (4, {"parallel": CP4, **FAR}),
    "CP2 TP2 SP, Megatron's optimizer, recompute selective": (
        4,
        {"parallel": {**CP2, "tensor": 2}, "optimizer": MEGATRON, "train": SELECTIVE},
    ),
    "CP2 PP2 interleaved, far": (4, {"parallel": {**CP2, "pipeline": 2, "virtual_pipeline": 2}, **FAR}),
    "CP2 DP2 ZeRO-1": (4, {"parallel": CP2}),
    "CP2 ZeRO-3, recompute full": (2, {"parallel": CP2, "optimizer": {"zero_stage": 3}, "train": FULL}),
}
MATRIX: dict[str, tuple[int, dict[str, Any]]] = {
    "CP2 ZeRO-2, microbatches of 2": (2, {"parallel": CP2, "optimizer": {"zero_stage": 2}, "train": {"micro_batch_size": 2}}),
    "CP2 DP2 ZeRO-2, reduced under way": (4, {"parallel": CP2, "optimizer": {"zero_stage": 2, "overlap_gradients": True}}),
    "CP2 TP2 SP ZeRO-3, far": (4, {"parallel": {**CP2, "tensor": 2}, "optimizer": {"zero_stage": 3}, **FAR}),
    "CP2 DP2 ZeRO-0": (4, {"parallel": CP2, "optimizer": {"zero_stage": 0}}),
    "CP2, microbatches of 2": (2, {"parallel": CP2, "train": {"micro_batch_size": 2}}),
    "CP2, Megatron's optimizer, far, recompute selective": (2, {"parallel": CP2, "optimizer": MEGATRON, "train": SELECTIVE, **FAR}),
    "CP4, Megatron's optimizer": (4, {"parallel": CP4, "optimizer": MEGATRON}),
    "CP4, far, recompute full": (4, {"parallel": CP4, "train": FULL, **FAR}),
    "CP2 DP2, Megatron's optimizer, far": (4, {"parallel": CP2, "optimizer": MEGATRON, **FAR}),
    "CP2 TP2": (4, {"parallel": {**CP2, "tensor": 2, "sequence": False}}),
    "CP2 TP2 SP, far, recompute full": (4, {"parallel": {**CP2, "tensor": 2}, "train": FULL, **FAR}),
    "CP2 PP2": (4, {"parallel": {**CP2, "pipeline": 2}}),
    "CP2 PP2 uneven, Megatron's optimizer": (4, {"parallel": {**CP2, "pipeline": 2, "pipeline_layers": [3, 5]}, "optimizer": MEGATRON}),
    "tied CP2": (2, {"parallel": CP2, **TIED}),
    "tied CP2 PP2": (4, {"parallel": {**CP2, "pipeline": 2}, **TIED}),
    "tied CP2 PP2, Megatron's optimizer, recompute full": (
        4,
        {"parallel": {**CP2, "pipeline": 2}, "optimizer": MEGATRON, "train": FULL, **TIED},
    ),
    "tied CP2 TP2 SP": (4, {"parallel": {**CP2, "tensor": 2}, **TIED}),
}


@pytest.fixture(scope="module")
def reference(workers: Callable[[int], Workers], started: Callable) -> Callable[..., Run]:
    """The run of one process with a case's model and windows, made once for each."""
    made: dict[str, Run] = {}

    def get(**identity: dict[str, Any]) -> Run:
        key = repr(identity)
        if key not in made:
            made[key] = execute(workers, 1, started(f"whole-rows-{len(made)}", **identity))
        return made[key]

    return get


def check(name: str, size: int, sections: dict[str, Any], workers: Any, started: Any, reference: Any) -> None:
    expected = reference(**{part: sections.get(part, {}) for part in ("model", "window")})
    compare(execute(workers, size, started(name.replace(" ", "_"), **sections)), expected)


@pytest.mark.parametrize("name", CASES)
def test_pieces_equal_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    check(name, *CASES[name], workers, started, reference)


@pytest.mark.matrix
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_pieces_equal_one_process(name: str, workers: Any, started: Any, reference: Any) -> None:
    check(name, *MATRIX[name], workers, started, reference)


def train_without_returned_gradients(raw: dict[str, Any], kind: str) -> dict[str, list[float]]:
    """A whole run in which what the ranks send each other in one kind of message of a backward pass arrives as zeros."""
    from swax_megatron.parallel.context_exchange.ranks import ContextRanks

    real = ContextRanks.exchange
    lost: list[int] = []

    def losing(self: Any, message: str, sends: list, receives: list) -> None:
        real(self, message, sends, receives)
        if message == kind:
            for _, tensor in receives:
                lost.append(tensor.zero_().numel())

    ContextRanks.exchange = losing
    try:
        return {**runs.train(raw), "lost": [float(len(lost))]}
    finally:
        ContextRanks.exchange = real


@pytest.mark.parametrize("kind", ["halo gradient", "memory gradient"])
def test_the_comparison_sees_a_gradient_lost_between_pieces(kind: str, workers: Any, started: Any, reference: Any) -> None:
    """The first loss is still right, and the run is told apart by its gradient norm or weights."""
    raw = started(f"lost_{kind.replace(' ', '_')}", parallel=CP2, **FAR)
    histories = workers(2).run(train_without_returned_gradients, raw, kind)
    assert histories[0]["lost"][0] > 0, "no such message reached the first rank"
    expected = reference(**FAR)
    assert histories[0]["loss/train"][0] == pytest.approx(expected[0]["loss/train"][0], abs=5e-6, rel=0)
    losses = {metric: expected[0][metric] for metric in ("loss/train", "loss/validation")}  # which would tell as well
    with pytest.raises(AssertionError):
        compare(({**histories[0], **losses}, runs.weights(Path(raw["run_dir"]), END)), expected)


def test_tokens_of_padded_rows_are_counted_once(workers: Any, corpus: Path, tmp_path: Path) -> None:
    """Every rank that shares a row reads all of it; rows of whole documents end in padding, which is counted nowhere."""
    logged = []
    for size in (1, 2):
        raw = runs.small_config(corpus, tmp_path / str(size), data={"packing": "best_fit"}, parallel={"context": size})
        workers(size).run(runs.train, raw)
        logged.append([json.loads(line) for line in (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()])
    full = 4 * runs.SEQUENCE_LENGTH
    assert logged[0][-1]["data/tokens_seen"] < full * len(logged[0]), "no row had padding"
    for whole, pieces in zip(*logged, strict=True):
        assert pieces["data/tokens_seen"] == whole["data/tokens_seen"]
        assert pieces["loss/train"] == pytest.approx(whole["loss/train"], abs=2e-5)


def test_bf16_pieces_stay_within_bf16_rounding(workers: Any, started: Any) -> None:
    """Only what crosses a seam is rounded otherwise; a gradient that does not cross it is seen."""
    found = []
    for name, size, task in (("rows", 1, runs.train), ("pieces", 2, runs.train), ("lost", 2, train_without_returned_gradients)):
        raw = started(f"bf16_{name}", interval=1, train={"precision": "bf16"}, parallel={"context": size})
        found.append((workers(size).run(task, raw, *["halo gradient"] * (name == "lost"))[0], first_gradients(raw)))
    rows, pieces, (_, lost) = found
    compare_rounded(pieces, rows, BF16)
    with pytest.raises(AssertionError, match="is off by"):
        compare_rounded((pieces[0], lost), rows, BF16)
