"""Fifty failures at random moments, and the run ends as if there had been none."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from swax_megatron.errors import ExitCode
from swax_megatron.resilience.events import read_events
from swax_megatron.resilience.goodput import account
from tests import runs
from tests.faults import jobs

FAILURES, STEPS, SEED = 50, 400, 20
KINDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.soak
def test_fifty_failures(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """One process is killed, or told to stop, again and again: in start-up, in a step, in a validation, in a save. Each start
    continues from the newest checkpoint; losses, tokens and the last weights are those of the clean run, to the last bit.
    SWAX_SOAK_RECORD names a file that gets the result as a JSON line.
    """
    raw = jobs.config(corpus, tmp_path / "run", steps=STEPS, interval=2, checkpoint={"keep_last": 3}, validation={"interval": 20})
    clean = {**raw, "run_dir": str(tmp_path / "clean")}
    workers(1).run(runs.train, clean)
    draw, ended, began = random.Random(SEED), [], time.monotonic()
    for _ in range(FAILURES):
        starts = len(jobs.events(tmp_path / "run", "start"))
        job, kind = jobs.Job(raw, processes=1), draw.choice(KINDS)
        if draw.random() < 0.15:
            time.sleep(draw.uniform(0.0, 6.0))  # in start-up
        else:
            wait_for_new_steps(job, starts + 1, draw.randint(1, 5))
            time.sleep(draw.uniform(0.0, 0.3))
        job.process.send_signal(kind)
        ended.append(job.ended())
        assert ended[-1] in (-kind, ExitCode.PREEMPTED), job.text()[-3000:]
    assert jobs.run(raw, processes=1) == ExitCode.FINISHED
    assert jobs.losses(tmp_path / "run") == jobs.losses(tmp_path / "clean")
    difference = runs.largest_difference(runs.weights(tmp_path / "run", STEPS), runs.weights(tmp_path / "clean", STEPS), "")[0]
    assert difference == 0.0
    found = account(read_events(tmp_path / "run"))
    reached = sum(attempt.first_step is not None for attempt in found.attempts)
    assert reached > FAILURES / 2 and ended.count(ExitCode.PREEMPTED) > 0, "too few failures fell into training to prove anything"
    if record := os.environ.get("SWAX_SOAK_RECORD"):
        counts = {name: ended.count(code) for name, code in (("killed", -9), ("term", -15), ("usr1", -10), ("saved and stopped", 75))}
        result = {
            "case": "soak",
            "failures": FAILURES,
            "ended": counts,
            "steps": STEPS,
            "last_loss": jobs.losses(tmp_path / "run")[-1][1],
            "clean_last_loss": jobs.losses(tmp_path / "clean")[-1][1],
            "largest_difference": difference,
            "wall_s": round(time.monotonic() - began, 1),
            "seconds_by_kind": {kind: round(seconds, 1) for kind, seconds in found.seconds.items()},
            "starts_that_reached_training": reached,
            "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "command": "SWAX_SOAK_RECORD=FILE pytest -m soak tests/faults/test_soak.py",
        }
        with Path(record).open("a") as file:
            file.write(json.dumps(result) + "\n")


def wait_for_new_steps(job: jobs.Job, attempt: int, steps: int) -> None:
    """Until this start (the run's so many-th) has done so many; it first drops the metrics beyond its checkpoint."""

    def done() -> bool:
        resumed = jobs.events(job.run_dir, "resume")
        if not resumed or resumed[-1]["attempt"] != attempt:
            return False
        return len(jobs.metrics(job.run_dir)) >= int(resumed[-1]["step"]) + steps

    job.until(done)
