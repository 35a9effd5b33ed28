"""A run that is told to stop: all ranks at the same step, one save, exit code 75, and the same run afterwards."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from swax_megatron.errors import ExitCode
from swax_megatron.resilience.events import ended_with
from tests import runs
from tests.faults import jobs

STEPS = 8


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory, workers: Any) -> Path:
    """The run directory of the uninterrupted run of two processes."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    workers(2).run(runs.train, jobs.config(corpus, run_dir))
    return run_dir


def saved(run_dir: Path) -> list[int]:
    return [event["step"] for event in jobs.events(run_dir, "saved")]


def test_sigterm_saves_and_the_run_goes_on(whole: Path, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """SIGTERM to the launcher, and again while the ranks are ending."""
    raw = jobs.config(corpus, tmp_path / "run", interval=100)
    job = jobs.Job(raw, overrides=("train.distributed_timeout=60",))
    job.until_step(1)
    job.process.send_signal(signal.SIGTERM)
    job.until(lambda: jobs.events(tmp_path / "run", "signal"))
    job.process.send_signal(signal.SIGTERM)
    assert job.ended() == ExitCode.PREEMPTED, job.text()
    assert ended_with(tmp_path / "run") == ExitCode.PREEMPTED
    (told,) = jobs.events(tmp_path / "run", "signal")
    assert told["reason"] == "SIGTERM" and saved(tmp_path / "run") == [told["step"]], "one save"
    assert len(jobs.losses(tmp_path / "run")) == told["step"] < STEPS
    assert "Traceback" not in job.text()
    workers(2).run(runs.train, raw)
    assert jobs.losses(tmp_path / "run") == jobs.losses(whole)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["SIGUSR1 to one rank", "SIGTERM before the first step", "stop file"])
def test_other_ways_to_stop(how: str, whole: Path, corpus: Path, tmp_path: Path, workers: Any) -> None:
    raw = jobs.config(corpus, tmp_path / "run", interval=100)
    job = jobs.Job(raw)
    if how == "SIGTERM before the first step":
        job.until(lambda: jobs.events(tmp_path / "run", "start"))
        job.process.send_signal(signal.SIGTERM)
    else:
        job.until_step(1)
        if how == "stop file":
            (tmp_path / "run" / "STOP").touch()
        else:
            signal_rank(job, 1, signal.SIGUSR1)
    assert job.ended() == ExitCode.PREEMPTED, job.text()
    assert jobs.events(tmp_path / "run", "signal")[-1]["reason"] == (how if how == "stop file" else how.split()[0])
    if how == "stop file":
        assert jobs.run(raw) == ExitCode.USER_ERROR
        assert "STOP tells this run to stay stopped: remove the file" in job.text()
        (tmp_path / "run" / "STOP").unlink()
    workers(2).run(runs.train, raw)
    assert jobs.losses(tmp_path / "run") == jobs.losses(whole)


def signal_rank(job: jobs.Job, rank: int, number: signal.Signals) -> None:
    import os

    os.kill(job.worker(rank), number)


@pytest.mark.parametrize("moment", ["validation", "save", "last save"])
def test_a_stop_asked_on_one_rank_at_an_awkward_moment(moment: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Between two passes of a validation, while a checkpoint is written, and while the last one is."""
    raw = jobs.config(corpus, tmp_path / "run", validation={"interval": 4, "sequences": 9})
    uninterrupted = {**raw, "run_dir": str(tmp_path / "whole")}
    workers(2).run(runs.train, uninterrupted)
    stopped_at = workers(2).run(train_until_told, raw, moment)
    expected = {"validation": 4, "save": 3, "last save": STEPS}[moment]
    assert stopped_at == [expected, expected]
    assert saved(tmp_path / "run") == [3, 4][: 2 if moment == "validation" else 1] if moment != "last save" else [3, 6, 8]
    assert ("loss/validation" in jobs.metrics(tmp_path / "run")[-1]) == (moment == "last save"), "a validation that was given up"
    workers(2).run(runs.train, raw)
    assert jobs.losses(tmp_path / "run") == jobs.losses(tmp_path / "whole")


def train_until_told(raw: dict[str, Any], moment: str) -> int:
    """Rank 1 is told to stop at the given moment; the step at which this rank stopped."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, checkpoints = build_trainer(config, groups)
        checkpoints.resume(trainer)
        owner, name = (trainer, "load_microbatches") if moment == "validation" else (trainer.backend, "fragments")
        original = getattr(owner, name)

        def told(*arguments: Any, **named: Any) -> Any:
            due = {"validation": len(arguments) == 2, "save": True, "last save": trainer.state.step == STEPS}[moment]
            if groups.rank == 1 and due:
                trainer.stop._note(signal.SIGUSR1, None)
            return original(*arguments, **named)

        setattr(owner, name, told)
        trainer.fit()
        return trainer.state.step
