"""Runs side by side: tables, plots and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swax_megatron.config import from_dict, to_yaml
from swax_megatron.eval.compare import compare, main
from swax_megatron.eval.units import Units

pytest.importorskip("matplotlib", reason="comparisons draw plots: pip install '.[eval]'")


def write_run(folder: Path, window: int, *, vocabulary: int = 300, evaluation: bool = True) -> Path:
    folder.mkdir(parents=True)
    raw = {"run_dir": str(folder), "model": {"vocab_size": vocabulary, "pattern": "MS"}}
    raw["window"] = {"windows": [window], "schedule": "fixed"}
    (folder / "config.yaml").write_text(to_yaml(from_dict(raw)))
    steps = [
        {"step": s, "loss/train": 5 - s / 10, "window/size": window, "throughput/tokens_per_second_per_device": 7.0} for s in range(30)
    ]
    steps[-1]["loss/validation"] = 2.5 + window / 1000
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 3')
    if evaluation:
        units = Units(folder / "evaluation", {"model": str(folder), "window": window})
        units.put("ruler-vt-1024", {"kind": "ruler", "task": "vt", "length": 1024, "samples": 5, "score": window / 10})
        gaps = [{"from": 8, "to": 16, "accuracy": 0.5, "queries": 3}]
        units.put("recall-64", {"kind": "recall", "length": 64, "by_gap": gaps})
    return folder


def test_tables_and_plots(tmp_path):
    runs = [write_run(tmp_path / "narrow", 128), write_run(tmp_path / "wide", 512), write_run(tmp_path / "bare", 64, evaluation=False)]
    text = compare(runs, tmp_path / "out").read_text()
    assert "| window.windows | [128] | [512] | [64] |" in text
    assert "| validation loss, last | 2.628 | 3.012 | 2.564 |" in text
    assert "| training loss, mean of the last 20 | 3.05 |" in text
    assert "| vt at 1024 | 12.8 | 51.2 |" in text and "| 8-15 of 64 | 0.5 | 0.5 |" in text
    assert "run_dir" not in text
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"loss.png", "windows.png", "validation.png", "ruler.png", "recall.png"}


def test_what_cannot_be_compared(tmp_path, capsys):
    one, other = write_run(tmp_path / "one", 128), write_run(tmp_path / "other", 128, vocabulary=500)
    for runs, sentence in (
        ([one, other], "other and one cannot be compared: model.vocab_size differs (500 and 300)"),
        ([one], "give at least two runs"),
        ([one, one], "runs share a name"),
        ([one, tmp_path / "absent"], "is no run directory with steps done: config.yaml is missing"),
    ):
        assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
        assert sentence in capsys.readouterr().err
