"""What a run reports: TensorBoard events, metrics.jsonl, the progress line, throughput that adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swax_megatron.config import from_dict
from swax_megatron.model.cost import training_flops
from swax_megatron.model.window import WindowSchedule
from tests import runs
from tests.resume.test_resume import forget_after, launch

NAMES = {
    "loss/train",
    "loss/max_over_ranks",
    "optim/grad_norm",
    "optim/learning_rate",
    "window/size",
    "throughput/tokens_per_second_per_device",
    "throughput/model_tflops",
    "throughput/mfu",
    "time/step",
    "time/data_wait_fraction",
    "data/epoch",
    "data/tokens_seen",
    "goodput/fraction",
}


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def test_events_and_lines_of_a_resumed_run(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Every step once, in both files, with equal values; validation at every window; the resolved configuration."""
    raw = runs.small_config(corpus, tmp_path, checkpoint={"interval": 2, "keep_last": 0}, validation={"interval": 2})
    workers(2).run(runs.train, raw)
    forget_after(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "loss/tr')  # what a killed process leaves
    workers(2).run(runs.train, raw)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = events(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert set(found.Tags()["scalars"]) >= NAMES | {"loss/validation", "loss/validation/window_5", "loss/validation/window_23"}
    for name in NAMES:
        assert [event.step for event in found.Scalars(name)] == [0, 1, 2, 3], name
        assert [event.value for event in found.Scalars(name)] == pytest.approx([line[name] for line in lines], rel=1e-6), name
    assert [line.get("loss/validation") == line.get("loss/validation/window_23") for line in lines] == [True] * 4
    assert ["loss/validation" in line for line in lines] == [False, True, False, True]
    assert "config/text_summary" in found.Tags()["tensors"]


def test_throughput_adds_up(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """MFU = FLOPs of the drawn window x tokens a second and device / peak; tokens seen are rows x length."""
    raw = runs.small_config(corpus, tmp_path, monitor={"peak_tflops": 0.5}, checkpoint={"interval": 2})
    workers(2).run(runs.train, raw)
    config = from_dict(raw)
    schedule = WindowSchedule.from_config(config)
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        tokens = config.train.global_batch_size * runs.SEQUENCE_LENGTH
        rate = tokens / line["time/step"] / 2
        assert line["throughput/tokens_per_second_per_device"] == pytest.approx(rate)
        flops = training_flops(config.model, runs.SEQUENCE_LENGTH, schedule.layers(line["step"]))
        assert line["throughput/mfu"] == pytest.approx(flops * rate / 0.5e12)
        assert line["data/tokens_seen"] == tokens * (line["step"] + 1)
        assert line["window/size"] == schedule.window(line["step"])
        assert ("time/checkpoint_blocking" in line) == (line["step"] == 2), "a save's time is told with the step after it"


def test_the_console(corpus: Path, tmp_path: Path) -> None:
    """A start line and a progress line with loss, window, tokens/s, MFU and ETA, and nothing that looks like an error."""
    raw = runs.small_config(corpus, tmp_path / "run", monitor={"log_interval": 1}, validation={"interval": 4})
    job = launch(raw, tmp_path / "config.yaml", 2)
    assert job.wait(timeout=240) == 0
    text = (tmp_path / "config.log").read_text()
    assert "parameters, step 0 of 4, 2 processes (tensor 1, pipeline 1, context 1, data 2)" in text
    assert from_dict(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())) == from_dict(raw)
    (last,) = [line for line in text.splitlines() if "step 4/4" in line]
    for part in ("loss ", "validation ", "window ", "tok/s", "MFU ", "ETA 0:00"):
        assert part in last
    for word in ("Traceback", "Error", "Warning"):
        assert word not in text, text


def test_memory_of_every_head_whatever_the_layout(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """One median and one histogram a layer and statistic, equal at TP2, PP2 and in one process; the weights are not touched."""
    model = {"pattern": "MSFM"}
    found = {}
    for name, size, parallel in (("one", 1, {}), ("tensor", 2, {"tensor": 2}), ("pipeline", 2, {"pipeline": 2})):
        raw = runs.small_config(corpus, tmp_path / name, model=model, parallel=parallel, monitor={"memory_interval": 2}, train={"steps": 2})
        found[name] = workers(size).run(runs.train, raw)[0]
        bare = runs.small_config(corpus, tmp_path / f"{name}_bare", model=model, parallel=parallel, train={"steps": 2})
        if size == 1:
            assert workers(size).run(runs.train, bare)[0]["loss/train"] == found[name]["loss/train"]
    lines = {name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1]) for name in found}
    names = {name for name in lines["one"] if name.startswith(("memory/layer", "attention/layer"))}
    assert {name.split("/")[1] for name in names} == {"layer_00", "layer_01", "layer_02", "layer_03"} and len(names) == 2 * 5 + 2 * 2
    for layout in ("tensor", "pipeline"):
        for name in names:
            assert lines[layout][name] == pytest.approx(lines["one"][name], rel=1e-3, abs=1e-4), (layout, name)
    assert set(events(tmp_path / "tensor").Tags()["histograms"]) == names
