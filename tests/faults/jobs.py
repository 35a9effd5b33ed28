"""Jobs that faults are done to: the real program under launcher.run (or as one process), a run of a few short steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from swax_megatron.resilience.events import read_events
from tests import runs

ROOT = Path(__file__).parents[2]
DEADLINE = 240.0  # seconds after which a job that does not end fails its test


def config(corpus: Path, run_dir: Path, steps: int = 8, interval: int = 3, **sections: Any) -> dict[str, Any]:
    """8 steps, a checkpoint after 3 and 6 and at the end; Megatron's optimizer, whose import is fast."""
    return runs.small_config(
        corpus,
        run_dir,
        optimizer={"backend": "megatron", **sections.pop("optimizer", {})},
        train={"steps": steps, **sections.pop("train", {})},
        checkpoint={"interval": interval, "keep_last": 0, **sections.pop("checkpoint", {})},
        model={"pattern": "MS", **sections.pop("model", {})},
        **sections,
    )


def python_path() -> str:
    """This checkout first, then what the tests themselves were started with."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


class Job:
    """A started job. ``code``: its exit code once it ended."""

    def __init__(self, raw: dict[str, Any], processes: int = 2, overrides: tuple[str, ...] = ()) -> None:
        self.run_dir = Path(raw["run_dir"])
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(raw))
        self.log = self.run_dir.with_suffix(".log")
        module = ["launcher.run"] if processes > 1 else ["swax_megatron.train"]
        options = ["--processes", str(processes)] if processes > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": python_path()}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, str(path), *overrides, *options], cwd=ROOT, stdout=log, stderr=log, env=environment
            )

    def text(self) -> str:
        """What the job said, over all its starts."""
        return self.log.read_text()

    def until(self, reached: Callable[[], Any]) -> Any:
        """Wait for something of the job; its first true value."""
        deadline = time.monotonic() + DEADLINE
        while not (value := reached()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()[-4000:]
            time.sleep(0.02)
        return value

    def until_step(self, step: int) -> None:
        """Wait until the metrics of 0-based ``step`` are on disk."""
        self.until(lambda: any(line["step"] >= step for line in metrics(self.run_dir)))

    def worker(self, rank: int) -> int:
        """The process id of a rank, by its parent's children and their environment."""
        import psutil

        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child.pid
        raise AssertionError(f"no rank {rank}")

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end:\n{self.text()[-4000:]}") from None

    def kill(self) -> None:
        """SIGKILL of everything that this job started."""
        import psutil

        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in [*children]:
            process.send_signal(signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def run(raw: dict[str, Any], processes: int = 2, overrides: tuple[str, ...] = ()) -> int:
    """A job from its start to its end; the exit code."""
    return Job(raw, processes, overrides).ended()


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl; none where there is no file yet."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, targets, tokens seen) of every step: what no fault may change, lose or repeat."""
    return [(line["step"], line["loss/train"], line["data/targets"], line["data/tokens_seen"]) for line in metrics(run_dir)]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, oldest first."""
    return [event for event in read_events(run_dir) if event["event"] == kind]
