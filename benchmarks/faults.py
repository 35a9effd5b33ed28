"""How fast faults are seen and survived, on CPU processes: one JSON line a measurement.

* ``rank killed``: from SIGKILL of a rank to the end of the job
* ``hang``: from SIGSTOP of a rank to the report that names it, beside the configured limit, and to the end of the job
* ``signal to saved``: from SIGTERM to the launcher to the checkpoint on disk, beside a step's and a save's time
* ``restart``: from the start of the program to the first new step's metrics
* ``agreement``: what the two all-reduces a step (stop, skip) cost
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.corpus import write_corpus
from tests.faults import jobs

LIMIT = 15.0  # seconds of the hang's configured limit
LONG = {"steps": 400, "interval": 1000}


def struck(run_dir: Path) -> float:
    """When the injector struck: it leaves a mark right before."""
    return next((run_dir / "faults").iterdir()).stat().st_mtime


def rank_killed(corpus: Path, run_dir: Path) -> dict[str, Any]:
    code = jobs.run(jobs.config(corpus, run_dir, **LONG, resilience={"fault": "kill", "fault_rank": 1, "fault_step": 20}))
    return {"seconds": time.time() - struck(run_dir), "exit_code": code}


def hang(corpus: Path, run_dir: Path) -> dict[str, Any]:
    limits = {"hang_minimum": LIMIT, "hang_unknown": LIMIT, "hang_factor": 3.0}
    raw = jobs.config(corpus, run_dir, **LONG, resilience={"fault": "stop", "fault_rank": 1, "fault_step": 20, **limits})
    code = jobs.run(raw)
    ended = time.time()
    (told,) = jobs.events(run_dir, "hang")
    return {
        "limit_s": LIMIT,
        "to_report_s": told["time"] - struck(run_dir),
        "to_end_of_job_s": ended - struck(run_dir),
        "named": told["silent"],
        "exit_code": code,
    }


def signal_to_saved(corpus: Path, run_dir: Path) -> dict[str, Any]:
    job = jobs.Job(jobs.config(corpus, run_dir, **LONG))
    job.until_step(20)
    sent, step = time.time(), len(jobs.metrics(run_dir))
    job.process.send_signal(signal.SIGTERM)
    code = job.ended()
    ended = time.time()
    (saved,) = jobs.events(run_dir, "saved")
    steps = [line["time/step"] for line in jobs.metrics(run_dir)[5:]]
    return {
        "to_saved_s": saved["time"] - sent,
        "to_end_of_job_s": ended - sent,
        "steps_after_signal": saved["step"] - step,
        "step_s": median(steps),
        "save_s": saved["seconds"],
        "exit_code": code,
    }


def restart(corpus: Path, run_dir: Path) -> dict[str, Any]:
    raw = jobs.config(corpus, run_dir, **{**LONG, "interval": 10}, resilience={"fault": "kill", "fault_rank": 1, "fault_step": 25})
    raw["train"]["steps"] = 40
    killed = jobs.run(raw)
    done, started = len(jobs.metrics(run_dir)), time.time()
    job = jobs.Job(raw)
    job.until(lambda: jobs.events(run_dir, "resume")[1:])
    resumed = jobs.events(run_dir, "resume")[-1]
    job.until_step(done)
    new_step = time.time()
    return {
        "to_first_step_begins_s": resumed["time"] - started,
        "to_first_new_step_done_s": new_step - started,
        "steps_done_again": done - int(resumed["step"]),
        "exit_codes": [killed, job.ended()],
    }


def agreement(corpus: Path, run_dir: Path) -> dict[str, Any]:
    jobs.run(jobs.config(corpus, run_dir, steps=200, interval=1000))
    told = [event["seconds"] for event in jobs.events(run_dir, "progress")]
    steps = [line["time/step"] for line in jobs.metrics(run_dir)[5:]]
    return {"agreement_s_a_step": sum(seconds.get("agreement", 0.0) for seconds in told) / 200, "step_s": median(steps)}


CASES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "rank killed": rank_killed,
    "hang": hang,
    "signal to saved": signal_to_saved,
    "restart": restart,
    "agreement": agreement,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.faults --repeat 3 > faults_cpu.jsonl",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each (default 3)")
    options = parser.parse_args(argv)
    about = {
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "processes": 2,
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.faults " + " ".join(argv if argv is not None else sys.argv[1:]),
    }
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        write_corpus(corpus)
        for case in options.cases:
            for number in range(options.repeat):
                load = os.getloadavg()[0]
                measured = CASES[case](corpus, Path(folder) / f"{case.replace(' ', '_')}_{number}")
                rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in measured.items()}
                print(json.dumps({"case": case, **rounded, "load_1min": round(load, 2), **about}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
