"""python -m launcher.sweep with real runs: stopped and continued, a point that fails, several at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import sweep
from launcher.points import read_sweep
from swax_megatron.config import load_config
from swax_megatron.errors import ExitCode
from swax_megatron.validate import validate
from tests.faults import jobs

STEPS = 6


@pytest.fixture
def write(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a sweep over a small run; the processes it starts import this checkout."""
    monkeypatch.setenv("PYTHONPATH", jobs.python_path())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(jobs.ROOT)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(jobs.config(corpus, tmp_path / "runs", steps=STEPS, window={"anneal_fraction": 0})))

    def sweep_file(**content: Any) -> str:
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "base.yaml"), **content}, sort_keys=False))
        return str(tmp_path / "sweep.yaml")

    return sweep_file


def test_a_sweep_that_is_stopped_goes_on(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(grid={"window.windows": [[5], [23]]}, overrides=["window.probabilities=null"])
    first, second = tmp_path / "runs/000_windows=5", tmp_path / "runs/001_windows=23"
    process = subprocess.Popen([sys.executable, "-m", "launcher.sweep", file], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + jobs.DEADLINE
    while not jobs.metrics(first):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)  # its terminal is closed; to the points it is SIGTERM
    _, told = process.communicate(timeout=jobs.DEADLINE)
    assert process.returncode == ExitCode.PREEMPTED, told
    assert "000_windows=5: stopped" in told and not (second / "console.log").exists()
    assert 1 <= len(jobs.metrics(first)) < STEPS

    assert sweep.main([file]) == 0
    told = capsys.readouterr().err
    assert "2 points, 0 of them finished before" in told and f"--out {tmp_path}/runs/comparison" in told
    for folder, window in ((first, 5), (second, 23)):
        lines = jobs.metrics(folder)
        assert [line["step"] for line in lines] == list(range(STEPS))
        assert {line["window/size"] for line in lines} == {window}

    assert sweep.main([file]) == 0
    assert "2 of them finished before" in capsys.readouterr().err
    assert [len(jobs.events(folder, "start")) for folder in (first, second)] == [2, 1], "what is finished is not started again"

    (second / "config.yaml").write_text("format_version: 99")
    assert sweep.main([file]) == 0, "a file that cannot be read counts as a point to look after, not as an end of the sweep"
    assert "1 of them finished before" in capsys.readouterr().err and load_config(second / "config.yaml").train.steps == STEPS


def test_a_point_that_fails_stops_no_other(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(grid={"resilience.fault": ["exception", "none"]}, concurrent=2, overrides=["resilience.fault_step=1"])
    assert sweep.main([file, "train.steps=3"]) == ExitCode.RUN_ERROR
    told = capsys.readouterr().err
    console = tmp_path / "runs/000_fault=exception/console.log"
    assert f"000_fault=exception: failed with code {ExitCode.CRASHED.value}, see {console}" in told and "Error" in console.read_text()
    assert "001_fault=none: finished" in told and len(jobs.metrics(tmp_path / "runs/001_fault=none")) == 3
    assert "side by side" not in told


def test_refused_before_anything_starts(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for content, options, sentence in (
        ({"grid": {"train.steps": [2, -1]}}, [], "001_steps=1: train.steps=-1: must be 0 or more"),
        ({"grid": {"train.stepz": [2]}}, [], "unknown config field 'train.stepz'"),
        ({"grid": {"train.steps": [2]}}, ["--concurrent", "0"], "--concurrent 0: must be at least 1"),
        ({"grid": {"train.steps": [2, 3]}}, ["data.train.0.path=nowhere"], "000_steps=2: data.train.0.path='nowhere': no manifest.json"),
    ):
        assert sweep.main([write(**content), *options]) == ExitCode.USER_ERROR
        told = capsys.readouterr().err
        assert told.startswith(f"error: {sentence}") and told.count("\n") == 1
        assert not (tmp_path / "runs").exists()
    assert sweep.main([str(tmp_path / "absent.yaml")]) == ExitCode.USER_ERROR
    assert "absent.yaml cannot be read" in capsys.readouterr().err


def test_a_dry_run_prints_commands_that_can_be_started(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sweep.main([write(grid={"train.steps": [2, 3]}), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith(f"train.steps=3 run_dir={tmp_path}/runs/001_steps=3") and not (tmp_path / "runs").exists()


def test_the_shipped_sweep_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(jobs.ROOT)
    points = read_sweep("configs/sweep_windows.yaml", []).points
    configs = [load_config("configs/demo.yaml", point) for point in points]
    assert [config.window.windows for config in configs] == [[32], [128], [32, 128]]
    for config in configs:
        validate(config)


def test_gpus_are_shared_out() -> None:
    assert sweep.share_out([], 3) == []
    assert sweep.share_out(list("0123"), 1) == [list("0123")]
    assert sweep.share_out(list("0123"), 2) == [["0", "1"], ["2", "3"]]
    assert sweep.share_out(list("01"), 3) == [["0"], ["1"], ["0"]]
