"""Jobs on the tests' own Slurm: submit the batch script as a user does, wait, look, break."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests import runs

ROOT = Path(__file__).parents[2]
NODES = 3
DEADLINE = 400.0  # seconds after which a job that does not end fails its test
STEPS = 8
ALIVE = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD")


def config(corpus: Path, run_dir: Path, steps: int = STEPS, interval: int = 3, **sections: Any) -> dict[str, Any]:
    """Tensor parallel over two nodes, one process each; a checkpoint after 3 and 6 steps and at the end."""
    return runs.small_config(
        corpus,
        run_dir,
        model={"pattern": "MS"},
        parallel={"tensor": 2},
        optimizer={"backend": "megatron", **sections.pop("optimizer", {})},
        train={"steps": steps, "threads": 1, **sections.pop("train", {})},
        checkpoint={"interval": interval, "keep_last": 0},
        **sections,
    )


def slurm(*command: str) -> str:
    """The output of a Slurm command."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; no step is missing or logged twice."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return {line["step"]: line["loss/train"] for line in lines}


class Job:
    """One submitted pretraining job."""

    def __init__(self, raw: dict[str, Any], *arguments: str, options: tuple[str, ...] = ("--nodes=2",), preflight: bool = False) -> None:
        self.run_dir = Path(raw["run_dir"])
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        path = self.run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(raw))
        settings = {"SWAX_HOME": str(ROOT), "SWAX_PREFLIGHT": str(int(preflight))}
        self._submit(str(path), arguments, options, settings)

    @classmethod
    def plain(cls, config: str, run_dir: Path, *arguments: str) -> Job:
        """``sbatch slurm/pretrain_7b.sh --config FILE ...`` in the project's folder, without a setting or an option but the log's."""
        job = cls.__new__(cls)
        job.run_dir = run_dir
        job._submit(config, (f"run_dir={run_dir}", *arguments), (), {})
        return job

    def _submit(self, config: str, arguments: tuple[str, ...], options: tuple[str, ...], settings: dict[str, str]) -> None:
        self.log = self.run_dir.with_suffix(".out")
        environment = {**os.environ, **settings, "TMPDIR": "/tmp"}
        command = ["sbatch", "--parsable", f"--output={self.log}", *options, "slurm/pretrain_7b.sh", "--config", config, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def text(self) -> str:
        """What the batch script and rank 0 said, over all starts."""
        return self.log.read_text() if self.log.exists() else ""

    def shown(self, field: str) -> str:
        """A field of ``scontrol show job``."""
        return re.search(rf"\b{field}=(\S*)", slurm("scontrol", "-o", "show", "job", self.id)).group(1)

    def until(self, reached: Callable[[], Any], what: str) -> Any:
        """Wait for something; its first true value. Fails where the job ends before."""
        deadline = time.monotonic() + DEADLINE
        while not (value := reached()):
            state = self.shown("JobState")
            assert state in ALIVE, f"{state} before {what}\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}\n{self.text()[-4000:]}"
            time.sleep(0.05)
        return value

    def until_step(self, step: int) -> None:
        """Wait until the metrics of 0-based ``step`` are on disk."""
        self.until(lambda: (self.run_dir / "metrics.jsonl").exists() and max(losses(self.run_dir), default=-1) >= step, f"step {step}")

    def ended(self, seconds: float = DEADLINE) -> str:
        """Wait for the end; Slurm's word for it."""
        deadline = time.monotonic() + seconds
        while (state := self.shown("JobState")) in ALIVE:
            assert time.monotonic() < deadline, self.text()[-4000:]
            time.sleep(0.2)
        return state

    def processes(self, module: str, **environment: str) -> list[psutil.Process]:
        """The job's processes that run a module and have these variables."""
        wanted = {"SLURM_JOB_ID": self.id, "SLURM_CONF": os.environ["SLURM_CONF"], **environment}
        found = []
        for process in psutil.process_iter():
            try:
                if process.cmdline()[1:3] == ["-m", module] and wanted.items() <= process.environ().items():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def kill(self, module: str, **environment: str) -> None:
        """SIGKILL to the one process that fits."""
        (process,) = self.processes(module, **environment)
        process.send_signal(signal.SIGKILL)


class Cluster:
    """The running Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def script(self, action: str, node: str) -> None:
        """``kill`` a node or ``start`` it again."""
        subprocess.run([Path(__file__).with_name("cluster.sh"), action, self.folder, node], check=True)

    def clear(self) -> None:
        """No job left, every node up and idle."""
        for job in set(slurm("squeue", "-h", "-o", "%A").split()):
            subprocess.run(["scancel", job], check=False)
        deadline = time.monotonic() + 120
        while states := slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
            if all(line.endswith(" idle") for line in states):
                return
            assert time.monotonic() < deadline, states
            for node, state in (line.split() for line in states):
                if not (self.folder / f"slurmd.{node}.pid").exists():
                    self.script("start", node)
                if state.startswith(("down", "drain")):
                    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
            time.sleep(0.5)
