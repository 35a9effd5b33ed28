"""Faults on a real Slurm: after each one the run ends with the losses of a run that nothing happened to, or as documented.

Every step's loss is compared: a token lost or seen twice would change all that follow. Times are printed, never asserted.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.slurm.jobs import Cluster, Job, config, losses, slurm

pytestmark = pytest.mark.soak
LONG = 24


@pytest.fixture(scope="session")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory, workers: Any) -> dict[int, float]:
    """Losses of the same run on one machine that nothing happened to."""
    raw = config(corpus, tmp_path_factory.mktemp("whole") / "run", steps=LONG)
    return dict(enumerate(workers(2).run(runs.train, raw)[0]["loss/train"]))


@pytest.fixture
def job(cluster: Cluster, corpus: Path, tmp_path: Path) -> Callable[..., Job]:
    """Submits the run of these tests."""

    def start(*arguments: str, **options: Any) -> Job:
        return Job(config(corpus, tmp_path / "run", steps=LONG), *arguments, **options)

    return start


def starts(job: Job) -> list[str]:
    return [json.loads(line)["name"].removeprefix(job.id) for line in (job.run_dir / "starts.jsonl").read_text().splitlines()]


def finished(job: Job, expected: dict[int, float]) -> None:
    assert job.ended() == "COMPLETED", job.text()
    assert losses(job.run_dir) == expected


@pytest.mark.parametrize("node", ["0", "1"])
def test_sigkill_of_a_node_s_agent(job: Callable[..., Job], uninterrupted: dict[int, float], node: str) -> None:
    """Of the head node, which holds the rendezvous, and of the other: started again in the same allocation."""
    run = job()
    run.until_step(7)
    run.kill("launcher.run", SLURM_NODEID=node)
    finished(run, uninterrupted)
    assert starts(run) == ["_0", "_0.1"] and run.shown("Restarts") == "0"


def test_sigkill_of_a_rank(job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    run = job()
    run.until_step(7)
    run.kill("swax_megatron.train", RANK="1")
    finished(run, uninterrupted)
    assert starts(run) == ["_0", "_0.1"]
    assert "rank 1 ended first, with signal 9" in run.text()


def test_scontrol_requeue(job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    """SIGTERM: the step under way is finished and saved, and the requeued job goes on from there."""
    run = job()
    run.until_step(7)
    slurm("scontrol", "requeue", run.id)
    finished(run, uninterrupted)
    assert starts(run) == ["_0", "_1"] and run.shown("Restarts") == "1"
    second = json.loads((run.run_dir / "starts.jsonl").read_text().splitlines()[1])
    assert second["step"] >= 8, "nothing was saved when the signal came"
    assert (run.run_dir / "logs" / f"{run.id}_1" / "rank_1.log").exists()


def test_the_time_limit(job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    """Slurm announces the limit by SIGUSR1 to the batch script: saved, requeued by the script, continued."""
    run = job()
    run.until_step(7)
    slurm("scancel", "--batch", "--signal=USR1", run.id)
    finished(run, uninterrupted)
    assert starts(run) == ["_0", "_1"] and run.shown("Restarts") == "1"
    assert "the time limit is near" in run.text() and "requeue: the time of this allocation is over" in run.text()
    second = json.loads((run.run_dir / "starts.jsonl").read_text().splitlines()[1])
    assert second["step"] >= 8, "nothing was saved when the signal came"


def test_a_real_time_limit(job: Callable[..., Job], uninterrupted: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes, the signal one before their end (Slurm may send it a minute earlier), and a run that takes longer."""
    monkeypatch.setenv("SWAX_SUPERVISE", "--patience 9 --delay 1")
    slow = ("resilience.fault=slow", f"resilience.fault_steps={LONG}", "resilience.fault_seconds=0.8")  # in each of four microbatches
    run = job(*slow, options=("--nodes=2", "--time=2", "--signal=B:USR1@60"))
    assert run.ended(seconds=1200) == "COMPLETED", run.text()  # as many allocations as it takes
    assert losses(run.run_dir) == uninterrupted
    assert int(run.shown("Restarts")) >= 1 and starts(run)[:2] == ["_0", "_1"]
    assert "the time limit is near" in run.text()


def test_a_requeued_job_runs_what_was_submitted(job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    """Whatever the file says by then."""
    run = job()
    run.until_step(7)
    run.run_dir.with_suffix(".yaml").write_text("run_dir: elsewhere\n")
    slurm("scontrol", "requeue", run.id)
    finished(run, uninterrupted)
    assert "going on with the code and the configuration of" in run.text()


def test_a_stop_file_ends_the_job(job: Callable[..., Job]) -> None:
    run = job()
    run.until_step(7)
    (run.run_dir / "STOP").touch()
    assert run.ended() == "FAILED" and run.shown("ExitCode") == "75:0" and run.shown("Restarts") == "0"
    assert "stop: the file STOP is in the run directory: remove it and start again" in run.text()


def test_a_node_dies(cluster: Cluster, job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    """The whole node, slurmd and all: Slurm requeues the job, which goes on with the spare node."""
    run = job()
    run.until_step(7)
    cluster.script("kill", "sn1")
    slurm("scontrol", "update", "nodename=sn1", "state=down", "reason=dead")
    finished(run, uninterrupted)
    assert starts(run) == ["_0", "_1"] and run.shown("NodeList") == "sn[0,2]"


def test_the_head_node_dies(cluster: Cluster, job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    """With it the batch script: only Slurm is left to start the job again."""
    run = job()
    run.until_step(7)
    cluster.script("kill", "sn0")
    slurm("scontrol", "update", "nodename=sn0", "state=down", "reason=dead")
    finished(run, uninterrupted)
    assert starts(run) == ["_0", "_1"] and run.shown("NodeList") == "sn[1-2]"


def test_a_node_is_drained(job: Callable[..., Job], uninterrupted: dict[int, float]) -> None:
    """A drain lets the job run; requeued, it leaves the node."""
    run = job()
    run.until_step(4)
    slurm("scontrol", "update", "nodename=sn1", "state=drain", "reason=maintenance")
    run.until_step(9)
    assert run.shown("Restarts") == "0"
    slurm("scontrol", "requeue", run.id)
    finished(run, uninterrupted)
    assert run.shown("NodeList") == "sn[0,2]"


def test_preflight_names_a_broken_node_and_leaves_it_out(
    job: Callable[..., Job], tmp_path: Path, uninterrupted: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = tmp_path / "check.sh"
    check.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != sn0 ] || { echo "row remapping failed"; exit 1; }\n')
    check.chmod(0o755)
    monkeypatch.setenv("SWAX_NODE_CHECK", str(check))
    run = job(preflight=True)
    finished(run, uninterrupted)
    assert "preflight: sn0: SWAX_NODE_CHECK ended with 1: row remapping failed" in run.text()
    assert "leaving out sn0" in run.text() and run.shown("ExcNodeList") == "sn0" and run.shown("NodeList") == "sn[1-2]"


def test_a_run_that_gains_nothing_stops(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at its first step again and again: three starts, then an end in words, not a fourth."""
    monkeypatch.setenv("SWAX_SUPERVISE", "--patience 2 --delay 1")
    run = job("checkpoint.interval=0")
    for attempt in range(2):
        log = run.run_dir / "logs" / f"{run.id}_0{f'.{attempt}' if attempt else ''}" / "rank_0.log"
        run.until(lambda log=log: log.exists() and "step 1/" in log.read_text(), "first step")
        run.kill("launcher.run", SLURM_NODEID="1")
    assert run.ended() == "FAILED"
    assert starts(run) == ["_0", "_0.1"]
    assert "2 starts in a row gained no step (no checkpoint): starting again does not help" in run.text()


def test_a_cancelled_job_saves_and_stays_cancelled(job: Callable[..., Job]) -> None:
    run = job()
    run.until_step(7)
    slurm("scancel", run.id)
    assert run.ended() == "CANCELLED"
    time.sleep(3)
    assert run.shown("JobState") == "CANCELLED" and starts(run) == ["_0"]
    saved = subprocess.run(["ls", run.run_dir / "checkpoints"], capture_output=True, text=True).stdout.split()
    assert max(int(name.removeprefix("step_")) for name in saved) >= 8
