"""Needles in text: the rows, the measure against readers whose memory is known, the command's report and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval.__main__ import main
from swax_megatron.eval.needles import CUE, PASSAGE, by_gap, gaps, needle
from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from tests.texts import write_ids
from tests.unit.hf_reference import randomise

pytest.importorskip("matplotlib", reason="reports draw plots: pip install '.[eval]'")
LENGTH, VOCABULARY = 300, 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    source = np.random.default_rng(5)
    sizes = [40, LENGTH + 20, LENGTH - 1, LENGTH, LENGTH + 5, LENGTH + 60, 10]
    documents = [[*source.integers(3, VOCABULARY, size - 1).tolist(), 2] for size in sizes]
    return ShardedDataset(write_ids(tmp_path_factory.mktemp("needles") / "set", documents, vocab_size=VOCABULARY))


@dataclass
class Reader:
    """Predicts what followed the same CUE tokens among the last ``reach`` tokens, surely; else every id alike. Answers in odd chunks."""

    reach: int
    name = "a reader"
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCABULARY))

    def logits(self, ids_bt: Tensor) -> Iterator[tuple[int, Tensor]]:
        logits = torch.zeros(*ids_bt.shape, VOCABULARY)
        for row, ids in enumerate(ids_bt.tolist()):
            for t in range(CUE - 1, len(ids)):
                cue = ids[t - CUE + 1 : t + 1]
                places = [s for s in range(max(CUE, t + 1 - self.reach), t + 1) if ids[s - CUE : s] == cue]
                if places:
                    logits[row, t, ids[places[-1]]] = 50.0
        for start in range(0, ids_bt.shape[1], 37):
            yield start, logits[:, start : start + 37]


def test_rows_differ_in_the_first_passage_alone(dataset: ShardedDataset) -> None:
    texts = [np.arange(1000 * n, 1000 * n + LENGTH) for n in range(3)]
    assert gaps(LENGTH) == [64, 128, 256] and gaps(64 + PASSAGE) == [64] and gaps(64 + PASSAGE - 1) == []
    places = set()
    for number in range(20):
        row, control, second = needle(texts, LENGTH, 128, 7, number)
        first = second - 128
        places.add(first)
        assert np.flatnonzero(row != control).tolist() == list(range(first, first + PASSAGE))
        assert (row[first : first + PASSAGE] == row[second : second + PASSAGE]).all()
        assert (row[second] // 1000) == (number + 1) % 3 and (control[first] // 1000) == number % 3
        again = needle(texts, LENGTH, 128, 7, number)
        assert (again[0] == row).all() and again[2] == second
    assert len(places) > 10 and max(places) <= LENGTH - 128 - PASSAGE


@pytest.mark.parametrize("reach", [100, 200, 1000])
def test_the_measure_sees_how_far_a_memory_reaches(dataset: ShardedDataset, reach: int) -> None:
    found = by_gap(Reader(reach), dataset, LENGTH, rows=6, batch=4, seed=1, progress=lambda *_: None)
    assert [entry["gap"] for entry in found["by_gap"]] == [64, 128, 256]
    for entry in found["by_gap"]:
        remembered = entry["gap"] + CUE <= reach
        assert entry["right"] == (1.0 if remembered else pytest.approx(0.0, abs=0.05))
        assert entry["nats"] == pytest.approx(0.0 if remembered else math.log(VOCABULARY), abs=1e-3)
        assert entry["control_nats"] == pytest.approx(math.log(VOCABULARY), abs=1e-3)
        assert entry["control_right"] == pytest.approx(0.0, abs=0.05) and entry["tokens"] == 6 * (PASSAGE - CUE)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = SwaxConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_mlstm_heads=2,
        layer_types=["linear_attention", "sliding_attention"], sliding_window=8,
    )  # fmt: skip
    model = SwaxForCausalLM(config)
    randomise(model)
    folder = tmp_path_factory.mktemp("export")
    model.save_pretrained(folder)
    return folder


def test_command(export: Path, dataset: ShardedDataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [str(export), "--data", str(dataset.path), "--needles", "--needle-rows", "3", "--batch", "2", "--documents", "2"]
    assert main([*command, "--out", str(tmp_path / "out"), "--needle-length", str(LENGTH)]) == 0
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["needles"]
    assert len(found["by_gap"]) == 3 and all(entry["nats"] > 0 for entry in found["by_gap"])
    report = (tmp_path / "out/report.md").read_text()
    assert "## Needles" in report and "| 256 | " in report and (tmp_path / "out/needles.png").exists()
    capsys.readouterr()
    for more, sentence in (
        (["--needle-length", "90"], "--needle-length 90: must be at least 96"),
        (["--needle-length", "361"], "fewer than two documents have 361 tokens; give a smaller --needle-length"),
        (["--needle-rows", "0"], "--needle-rows 0: must be at least 1"),
    ):
        assert main([*command, "--out", str(tmp_path / "refused"), *more]) == 2
        assert sentence in capsys.readouterr().err
    assert main([str(export), "--out", str(tmp_path / "refused"), "--needles", "--recall"]) == 2
    assert "--needles are passages of documents: give them with --data" in capsys.readouterr().err
