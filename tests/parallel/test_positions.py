"""Loss by position in training: equal to per-token losses taken by hand, at every kind of layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from swax_megatron.data.recall import EOS
from tests import runs
from tests.workers import Workers

TEST_WINDOW = 17


def validated(raw: dict[str, Any]) -> dict[str, float]:
    """What a validation reports, before any step."""
    from swax_megatron.build import build_trainer
    from swax_megatron.callbacks.validation import Validation

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        (callback,) = [each for each in trainer.callbacks if isinstance(each, Validation)]
        return callback.losses(trainer)


def by_hand(raw: dict[str, Any]) -> dict[str, float]:
    """The same from one process's logits, position by position."""
    from swax_megatron.build import build_trainer
    from swax_megatron.callbacks.validation import Validation
    from swax_megatron.parallel.context import sequence_context

    sums = {"000000": [0.0, 0], "000064": [0.0, 0]}
    beyond = 0
    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        (callback,) = [each for each in trainer.callbacks if isinstance(each, Validation)]
        (model,) = trainer.backend.chunks
        for batch in callback._batches(trainer):
            with torch.no_grad():
                logits_sbv = model(batch.inputs_bt, sequence_context(batch, trainer.windows.expand(TEST_WINDOW), None))
            nats_t = F.cross_entropy(logits_sbv[:, 0].double(), batch.targets_bt[0], reduction="none")
            position = -1
            for t in range(len(nats_t)):
                after_end = config.model.document_boundary == "reset" and batch.inputs_bt[0, t - 1] == EOS
                position = 0 if t == 0 or after_end else position + 1
                if batch.loss_mask_bt[0, t]:
                    entry = sums["000064" if position >= 64 else "000000"]
                    entry[0] += float(nats_t[t])
                    entry[1] += 1
                    beyond += position >= TEST_WINDOW
    targets = sum(count for _, count in sums.values())
    found = {f"loss/by_position/{name}": nats / count for name, (nats, count) in sums.items() if count}
    return found | {"validation/beyond_window": beyond / targets, "loss/validation": sum(nats for nats, _ in sums.values()) / targets}


LAYOUTS = {
    "one process": {},
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "context": {"parallel": {"context": 2}},
    "data": {"train": {"micro_batch_size": 2}},
}


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory, workers: Callable[[int], Workers]) -> dict[str, dict[str, float]]:
    found = {}
    for boundary in ("reset", "carry"):
        raw = settings(corpus, tmp_path_factory.mktemp(boundary), boundary, {})
        (found[boundary],) = workers(1).run(by_hand, raw)
    assert 0 < found["reset"]["validation/beyond_window"] < found["carry"]["validation/beyond_window"] < 1
    assert "loss/by_position/000064" in found["carry"], "documents of the rows are shorter, the rows are not"
    return found


def settings(corpus: Path, run_dir: Path, boundary: str, layout: dict[str, Any]) -> dict[str, Any]:
    raw = runs.small_config(corpus, run_dir, window={"test_window": TEST_WINDOW}, validation={"interval": 1}, **layout)
    raw["model"]["document_boundary"] = boundary
    return raw


@pytest.mark.parametrize(
    ("layout", "boundary"), [*((layout, "carry") for layout in LAYOUTS), ("one process", "reset"), ("context", "reset")]
)
def test_loss_by_position_at_every_layout(
    layout: str, boundary: str, corpus: Path, tmp_path: Path, workers: Callable[[int], Workers], expected: dict[str, dict[str, float]]
) -> None:
    raw = settings(corpus, tmp_path, boundary, LAYOUTS[layout])
    reports = workers(1 if layout == "one process" else 2).run(validated, raw)
    assert all(report == reports[0] for report in reports)
    found = {name: value for name, value in reports[0].items() if not name.startswith("loss/validation/")}
    assert found == pytest.approx(expected[boundary], abs=2e-5)
