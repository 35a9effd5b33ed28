"""Faults done to real jobs: each ends with the losses of the uninterrupted run, or with its documented stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from swax_megatron.errors import ExitCode
from tests import runs
from tests.corpus import write_corpus
from tests.faults import jobs

STEPS = 8
HANG = {"hang_minimum": 20.0, "hang_unknown": 20.0, "hang_factor": 3.0}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory, workers: Any) -> Path:
    """The run directory of the uninterrupted run of two processes."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    workers(2).run(runs.train, jobs.config(corpus, run_dir))
    return run_dir


def faulty(corpus: Path, run_dir: Path, kind: str, **resilience: Any) -> dict[str, Any]:
    return jobs.config(corpus, run_dir, resilience={"fault": kind, "fault_rank": 1, "fault_step": 4, **HANG, **resilience})


def same_as(whole: Path, run_dir: Path) -> None:
    """No step, no token, no bit of the weights is lost, repeated or changed."""
    assert jobs.losses(run_dir) == jobs.losses(whole)
    assert runs.largest_difference(runs.weights(run_dir, STEPS), runs.weights(whole, STEPS), "")[0] == 0.0


CRASHES = [
    pytest.param("kill", {128 + signal.SIGKILL}, id="SIGKILL of a rank"),
    pytest.param("segfault", {128 + signal.SIGSEGV}, id="segmentation fault", marks=pytest.mark.soak),
    pytest.param("exception", {ExitCode.CRASHED}, id="exception on one rank", marks=pytest.mark.soak),
    pytest.param("sigterm", {ExitCode.PREEMPTED}, id="SIGTERM to one rank", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("kind", "codes"), CRASHES)
def test_a_rank_that_dies(kind: str, codes: set[int], whole: Path, corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = faulty(corpus, tmp_path / "run", kind)
    job = jobs.Job(raw)
    assert job.ended() in codes, job.text()[-3000:]
    if kind == "sigterm":  # struck within step 4: that step is done, and saved, and none more
        assert [event["step"] for event in jobs.events(tmp_path / "run", "signal")] == [5]
    workers(2).run(runs.train, raw)  # the next start, spared by the injector
    same_as(whole, tmp_path / "run")


HANGS = [
    pytest.param("stop", 0, [1], [], id="SIGSTOP of a rank"),
    pytest.param("gil", 120, [1], [], id="a rank that holds the interpreter's lock", marks=pytest.mark.soak),
    pytest.param("sleep", 600, [], [1], id="a rank that never arrives", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("kind", "seconds", "silent", "behind"), HANGS)
def test_a_hang(
    kind: str, seconds: float, silent: list[int], behind: list[int], whole: Path, corpus: Path, tmp_path: Path, workers: Any
) -> None:
    """Ended with code 76; the rank that did not arrive is named, and every rank that could has written its stacks."""
    raw = faulty(corpus, tmp_path / "run", kind, fault_seconds=seconds)
    job = jobs.Job(raw)
    assert job.ended() == ExitCode.HUNG, job.text()[-3000:]
    (hang,) = jobs.events(tmp_path / "run", "hang")
    assert (hang["silent"], hang["behind"]) == (silent, behind), job.text()[-3000:]
    who = r"rank\(s\) 1 \(.*\) did not arrive" if behind else r"no heartbeat from rank\(s\) 1 \("
    assert re.search(rf"error: hang: compute of step 4 takes longer than 20 s; {who}", job.text()), job.text()[-3000:]
    stacks = tmp_path / "run" / "hangs" / "attempt_1"
    assert "train_step" in (stacks / "rank_00000.txt").read_text()
    assert (stacks / "rank_00001.txt").exists() == (kind == "sleep")
    recorded = json.loads((stacks / "rank_00000_collectives.json").read_text())["entries"]
    assert "gloo:all_reduce" in {entry["profiling_name"] for entry in recorded}
    if kind == "gil":  # written by a thread that needs no lock
        assert "_hold_interpreter" in (stacks.parent / "attempt_1_rank_00001_locked.txt").read_text()
    workers(2).run(runs.train, raw)
    same_as(whole, tmp_path / "run")


def test_a_slow_rank_is_named(whole: Path, corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = faulty(corpus, tmp_path / "run", "slow", fault_step=1, fault_steps=3, fault_seconds=1.5, straggler_interval=4)
    workers(2).run(runs.train, raw)
    (first, *_) = jobs.events(tmp_path / "run", "straggler")
    assert first["step"] == 3 and list(first["ranks"]) == ["1"] and first["ratio"] > 1.3
    same_as(whole, tmp_path / "run")


def test_a_rare_long_step_is_no_hang() -> None:
    """A window seen less than three times has the long limit, however fast the others are."""
    from swax_megatron.resilience.progress import Progress

    progress = Progress()
    progress._durations[("compute", "128")].extend([0.1] * 50)
    progress._durations[("compute", "2048")].extend([1.0, 1.1, 3.0])
    for window, limit in (("128", 5.0), ("2048", 11.0), ("512", 900.0)):
        progress.enter("compute", 7, window)
        assert progress.limit(progress.mark, 10.0, 5.0, 900.0) == pytest.approx(limit)
    progress._durations[("callbacks", "")].extend([0.001] * 500)
    progress.enter("callbacks", 7)
    assert progress.limit(progress.mark, 10.0, 5.0, 900.0) == 900.0, "five hundred times nothing, then a long one"


@pytest.mark.parametrize("name", ["disk full while saving", "disk full for metrics", "data shard gone"])
def test_documented_stops(name: str, whole: Path, tmp_path: Path, workers: Any) -> None:
    """Exit code 1 (2 where a start meets it) and one sentence that names the file; mended, the run goes on as if nothing was."""
    data = write_corpus(tmp_path / "corpus_") if (tmp_path / "corpus_").mkdir() is None else tmp_path
    if name == "disk full while saving":
        raw = faulty(data, tmp_path / "run", "disk_full", fault_step=5)
        sentence = "error: checkpoint step_6 was not saved: rank 1: OSError"
    elif name == "disk full for metrics":
        raw = faulty(data, tmp_path / "run", "disk_full", fault_rank=0)
        sentence = r"error: step \d: metrics of .*/run cannot be written \(.*File too large\)"
    else:
        raw = jobs.config(data, tmp_path / "run")
        sentence = r"training data cannot be read \(.*/a/shard-\d+\.tar is missing; copy the data set again\)"
    job = jobs.Job(raw)
    if name == "data shard gone":
        job.until_step(0)
        away = tmp_path / "away"
        away.mkdir()
        for shard in (data / "a").glob("*.tar"):
            shutil.move(shard, away / shard.name)
    assert job.ended() == ExitCode.RUN_ERROR, job.text()[-3000:]
    assert re.search(sentence, job.text()), job.text()[-3000:]
    if name == "data shard gone":
        assert jobs.run(raw) == ExitCode.USER_ERROR
        for shard in away.iterdir():
            shutil.move(shard, data / "a" / shard.name)
    workers(2).run(runs.train, raw)
    same_as(whole, tmp_path / "run")


@pytest.mark.soak
def test_a_damaged_checkpoint(whole: Path, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Refused with exit code 2 and the file's name; moved away, the one before it continues the run."""
    raw = faulty(corpus, tmp_path / "run", "corrupt", fault_step=6)
    assert jobs.run(raw) == 128 + signal.SIGKILL
    job = jobs.Job(raw)
    assert job.ended() == ExitCode.USER_ERROR, job.text()[-3000:]
    assert "step_6" in job.text() and "sha256" in job.text()
    shutil.move(tmp_path / "run" / "checkpoints" / "step_6", tmp_path / "step_6")
    workers(2).run(runs.train, raw)
    same_as(whole, tmp_path / "run")


@pytest.mark.soak
def test_the_agent_dies(whole: Path, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """SIGKILL of the launcher: the workers notice that they are orphans and leave, so that a new start has the run alone."""
    import psutil

    raw = faulty(corpus, tmp_path / "run", "slow", fault_step=3, fault_steps=9, fault_seconds=2.0)
    job = jobs.Job(raw)
    job.until_step(2)
    workers_ = [job.worker(0), job.worker(1)]
    os.kill(job.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in workers_):
        assert time.monotonic() < deadline, "orphans train on"
        time.sleep(0.2)
    workers(2).run(runs.train, raw)
    same_as(whole, tmp_path / "run")
