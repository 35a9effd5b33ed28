"""How fast a job survives on a real Slurm, on CPU processes: one JSON line a measurement.

* ``rank killed``, ``agent killed``, ``head agent killed``: from SIGKILL to the decision to start again (every other process of
  the job has ended then), and to the first new step's metrics
* ``requeue``: from ``scontrol requeue`` to the checkpoint on disk, to the new start, and to the first new step's metrics
* ``time limit``: the same from Slurm's signal to the batch script

The new step is the first one that the run had not done before the fault. Starts Slurm by tests/slurm/cluster.sh in --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from swax_megatron.resilience.events import read_events
from tests.corpus import write_corpus
from tests.slurm.jobs import ROOT, Cluster, Job, config, losses, slurm

SCRIPT = ROOT / "tests" / "slurm" / "cluster.sh"
STEPS, AT = 400, 20


def measure(corpus: Path, run_dir: Path, fault: Callable[[Job], None]) -> dict[str, float | None]:
    """Seconds from the fault to what follows it."""
    job = Job(config(corpus, run_dir, steps=STEPS, interval=10))
    job.until_step(AT)
    struck, done = time.time(), max(losses(run_dir))
    fault(job)

    def again() -> bool:
        return len((run_dir / "starts.jsonl").read_text().splitlines()) > 1

    job.until(again, "second start")
    first_line = job.run_dir / "metrics.jsonl"
    resumed = job.until(lambda: [event for event in read_events(run_dir) if event["event"] == "resume"][1:], "resume")
    seen = max(int(resumed[0]["step"]), done + 1)
    job.until(lambda: first_line.read_text().count("\n") > seen, "new step")
    ended = time.time()
    subprocess.run(["scancel", "--signal=KILL", job.id], check=True)
    subprocess.run(["scancel", job.id], check=True)
    second = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[1])
    saved = [event["time"] - struck for event in read_events(run_dir) if event["event"] == "saved" and event["time"] > struck]
    return {
        "to_saved_s": saved[0] if saved and saved[0] < second["time"] - struck else None,
        "to_new_start_s": second["time"] - struck,
        "to_first_new_step_s": ended - struck,
        "resumed_at_step": float(resumed[0]["step"]),
        "steps_done_before": float(done + 1),
    }


CASES: dict[str, Callable[[Job], None]] = {
    "rank killed": lambda job: job.kill("swax_megatron.train", RANK="1"),
    "agent killed": lambda job: job.kill("launcher.run", SLURM_NODEID="1"),
    "head agent killed": lambda job: job.kill("launcher.run", SLURM_NODEID="0"),
    "requeue": lambda job: slurm("scontrol", "requeue", job.id) and None,
    "time limit": lambda job: slurm("scancel", "--batch", "--signal=USR1", job.id) and None,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.slurm --repeat 3 > slurm_cpu.jsonl",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each (default 3)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        up = time.time()
        done = subprocess.run([SCRIPT, "up", top / "slurm", "3"], capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, end="", file=sys.stderr)
            return done.returncode
        about = {
            "date": date.today().isoformat(),
            "command": "python -m benchmarks.slurm " + " ".join(sys.argv[1:] if argv is None else argv),
            "device": f"{os.cpu_count()} CPU cores, {platform.machine()}, three Slurm nodes on one machine",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "slurm": ""},
        }
        os.environ.update(SLURM_CONF=str(top / "slurm" / "slurm.conf"), SWAX_SCRATCH="/tmp")
        about["versions"]["slurm"] = slurm("sinfo", "--version").removeprefix("slurm-wlm ").removeprefix("slurm ")
        print(json.dumps({"case": "cluster up", "seconds": round(time.time() - up, 2), **about}), flush=True)
        cluster = Cluster(top / "slurm")
        try:
            corpus = top / "corpus"
            corpus.mkdir()
            write_corpus(corpus)
            for name in options.cases:
                for number in range(options.repeat):
                    cluster.clear()
                    found = measure(corpus, top / f"{name.replace(' ', '_')}_{number}", CASES[name])
                    load = os.getloadavg()[0]
                    rounded = {key: round(value, 2) if value is not None else None for key, value in found.items()}
                    print(json.dumps({"case": name, **rounded, "load_average": round(load, 1), **about}), flush=True)
        finally:
            subprocess.run([SCRIPT, "down", top / "slurm"], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
