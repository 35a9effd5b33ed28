"""Runs side by side: tables, plots and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swax_megatron.config import from_dict, to_yaml
from swax_megatron.eval.compare import compare, main
from swax_megatron.eval.units import Units

pytest.importorskip("matplotlib", reason="comparisons draw plots: pip install '.[eval]'")


def write_run(folder: Path, window: int, *, vocabulary: int = 300, evaluation: str = "evaluation", tokens: int = 9) -> Path:
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
        units = Units(folder / evaluation, {"model": str(folder), "window": window, "dtype": "fp32"})
        gaps = [{"from": 8, "to": 16, "accuracy": 0.5, "queries": 3}]
        positions = [{"from": a, "to": b, "nats": 3 + window / 1000, "tokens": tokens} for a, b in ((0, 64), (64, 100))]
        needles = [{"gap": 128, "control_nats": 3.0, "nats": 3 - window / 1000}]
        for name, content in {
            "ruler": {"task": "vt", "length": 1024, "samples": 5, "score": window / 10},
            "recall": {"length": 64, "by_gap": gaps},
            "perplexity": {"by_position": positions, "by_document_length": positions},
            "needles": {"length": 256, "by_gap": needles},
            "memory": {"heads": {"memory/layer_00/horizon": [1.0, window, 9999.0]}},
        }.items():
            units.add(name, name, {}, lambda content=content: content)
    return folder


def test_tables_and_plots(tmp_path):
    runs = [write_run(tmp_path / "narrow", 128), write_run(tmp_path / "wide", 512), write_run(tmp_path / "bare", 64, evaluation="")]
    text = compare(runs, tmp_path / "out").read_text()
    assert "| window.windows | [128] | [512] | [64] |" in text
    assert "| validation loss, last | 2.628 | 3.012 | 2.564 |" in text
    assert "| training loss, mean of the last 20 | 3.05 |" in text
    assert "| vt at 1024 | 12.8 | 51.2 |" in text and "| 8-15 of 64 | 0.5 | 0.5 |" in text
    assert "| window | 128 | 512 |" in text, "at which each was evaluated"
    assert "| 0-63 | 3.128 | 3.512 |" in text and "| 64-99 | 3.128 | 3.512 |" in text
    assert "| 128 of 256 | 0.128 | 0.512 |" in text and "| memory/layer_00/horizon | 128 | 512 |" in text
    assert "run_dir" not in text
    assert json.loads((tmp_path / "out/compare.json").read_text())["evaluation"]["RULER (%)"] == [["vt at 1024", "12.8", "51.2"]]
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"loss.png", "windows.png", "validation.png", "ruler.png", "recall.png", "loss_by_position.png"}


def test_what_cannot_be_compared(tmp_path, capsys):
    one, other = write_run(tmp_path / "one", 128), write_run(tmp_path / "other", 128, vocabulary=500)
    elsewhere = write_run(tmp_path / "elsewhere", 128, tokens=8)
    for runs, sentence in (
        ([one, other], "other and one cannot be compared: model.vocab_size differs (500 and 300)"),
        ([one, elsewhere], "elsewhere and one cannot be compared: their losses by position are of other documents (16 and 18 tokens)"),
        ([one], "give at least two runs"),
        ([one, one], "runs share a name"),
        ([one, tmp_path / "absent"], "is no run directory with steps done: config.yaml is missing"),
    ):
        assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
        assert sentence in capsys.readouterr().err


def test_another_folder_of_evaluations(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, window, evaluation="at_64")) for name, window in (("narrow", 128), ("wide", 512))]
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    assert "RULER" not in (tmp_path / "out/compare.md").read_text()
    assert main([*runs, "--out", str(tmp_path / "out"), "--evaluation", "at_64"]) == 0
    assert "| vt at 1024 | 12.8 | 51.2 |" in (tmp_path / "out/compare.md").read_text()
    assert main([*runs, "--out", str(tmp_path / "out"), "--evaluation", "at_65"]) == 2
    assert "--evaluation at_65: none of the runs has a folder of this name" in capsys.readouterr().err
