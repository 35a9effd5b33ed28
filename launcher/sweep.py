"""Run a sweep on this machine: a grid over any fields of the configuration in one YAML file, a few points at a time.

All points are checked before the first starts. A point runs as ``python -m launcher.run`` would run it, in a directory of its own;
what it prints is in its console.log. With several points at once (concurrent: in the file, or --concurrent) the GPUs are shared out
among them. A point that fails does not stop the others. SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on: what runs saves, the rest is not
begun, and the same command goes on there. Exit codes: 0 when every point is finished, 1 when one failed, 75 when it was stopped.
On a cluster: ``python -m launcher.submit --sweep FILE``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.points import Sweep, read_sweep
from launcher.policy import SIGNALLED
from launcher.run import check_fit
from swax_megatron.checkpoint.folder import newest_step
from swax_megatron.config import load_config
from swax_megatron.errors import ExitCode
from swax_megatron.schema import Config
from swax_megatron.validate import validate_run_dir

EPILOG = """\
example:
  python -m launcher.sweep configs/sweep_windows.yaml
  python -m launcher.sweep configs/sweep_windows.yaml train.steps=20 --concurrent 2
  python -m launcher.sweep configs/sweep_windows.yaml --dry-run

a sweep file:
  base: configs/demo.yaml
  overrides: [train.steps=200]
  concurrent: 4
  grid: {optimizer.learning_rate: [1.0e-3, 3.0e-3], parallel.tensor: [1, 2]}
"""


@dataclass
class Point:
    """One run of a sweep, and the process that it has while it runs."""

    overrides: list[str]
    config: Config
    process: subprocess.Popen | None = None
    slot: int = 0
    started: float = 0.0

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def finished(self) -> bool:
        """Whether an earlier call brought it to its end; with another configuration the run itself tells what may change."""
        if newest_step(self.folder / "checkpoints") < self.config.train.steps:
            return False
        try:
            return load_config(self.folder / "config.yaml") == self.config
        except ValueError:  # damaged, or of another version: the run looks after it
            return False


class Grid:
    """Starts points in free slots until all are done."""

    def __init__(self, base: str, points: Sequence[Point], concurrent: int, gpus: Sequence[str]) -> None:
        self.base, self.waiting, self.concurrent = base, list(points), concurrent
        self.shares = share_out(gpus, concurrent)
        self.running: list[Point] = []
        self.failed: list[Point] = []
        self.stopped = False  # a point saved and ended before its last step
        self.told: int | None = None  # the signal this program had

    def stop(self, number: int, _: object) -> None:
        """Signal handler: begin nothing more; let what runs save. A closed terminal (SIGHUP) ends the points as SIGTERM does."""
        if self.told is None:
            self.told = number = signal.SIGTERM if number == signal.SIGHUP else number
            for point in self.running:
                point.process.send_signal(number)

    def run(self) -> int:
        """Until the end; the exit code."""
        while self.running or (self.waiting and self.told is None):
            while self.waiting and len(self.running) < self.concurrent and self.told is None:
                self._start(self.waiting.pop(0))
            time.sleep(0.2)
            for point in [point for point in self.running if point.process.poll() is not None]:
                self.running.remove(point)
                self._ended(point)
        if self.failed:
            return ExitCode.RUN_ERROR
        return ExitCode.PREEMPTED if self.stopped or self.waiting else ExitCode.FINISHED

    def _start(self, point: Point) -> None:
        point.slot = min(set(range(self.concurrent)) - {other.slot for other in self.running})
        environment = dict(os.environ)
        if self.shares:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.shares[point.slot])
        command = [sys.executable, "-m", "launcher.run", self.base, *point.overrides]
        point.started = time.monotonic()
        try:
            point.folder.mkdir(parents=True, exist_ok=True)
            with (point.folder / "console.log").open("a") as console:
                point.process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as error:  # those that run already go on
            self.failed.append(point)
            print(f"{point.folder.name}: could not be started: {error}", file=sys.stderr, flush=True)
            return
        self.running.append(point)
        print(f"{point.folder.name}: started, see {point.folder}/console.log", file=sys.stderr, flush=True)
        if self.told is not None:  # a signal that came while the process was made
            point.process.send_signal(self.told)

    def _ended(self, point: Point) -> None:
        code, seconds = point.process.returncode, time.monotonic() - point.started
        code = code if code >= 0 else 128 - code
        if code == ExitCode.FINISHED:
            how = "finished"
        elif code == ExitCode.PREEMPTED or (self.told is not None and code in SIGNALLED):
            how, self.stopped = "stopped", True
        else:
            how = f"failed with code {code}, see {point.folder}/console.log"
            self.failed.append(point)
        print(f"{point.folder.name}: {how} after {seconds:.0f} s", file=sys.stderr, flush=True)


def share_out(gpus: Sequence[str], concurrent: int) -> list[list[str]]:
    """The GPUs of every slot: equal shares, or one each that slots share where there are fewer GPUs. Empty on the CPU."""
    if not gpus:
        return []
    each = max(1, len(gpus) // concurrent)
    return [[gpus[(slot * each + number) % len(gpus)] for number in range(each)] for slot in range(concurrent)]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES must say to name the GPUs this process sees."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def check(sweep: Sweep, share: int) -> list[Point]:
    """Every point, with its configuration. share: GPUs a point has, 0 on the CPU. ValueError where one does not fit."""
    points = [Point(overrides, load_config(sweep.base, overrides)) for overrides in sweep.points]
    for point in points:
        try:
            check_fit(point.config, 1, share)
        except ValueError as error:
            raise ValueError(f"{point.folder.name}: {error}") from error
    return points


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.sweep", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="FILE", help="a sweep file (docs/slurm.md, Sweeps)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of every point")
    parser.add_argument("--concurrent", type=int, metavar="N", help="points that run at once (default: the file's, or 1)")
    parser.add_argument("--dry-run", action="store_true", help="check, print the command of every point, start nothing")
    options = parser.parse_intermixed_args(argv)
    try:
        sweep = read_sweep(options.sweep, options.overrides)
        concurrent = sweep.concurrent or 1 if options.concurrent is None else options.concurrent
        if concurrent < 1:
            raise ValueError(f"--concurrent {concurrent}: must be at least 1")
        gpus = visible_gpus()
        points = check(sweep, max(1, len(gpus) // concurrent) if gpus else 0)
        if options.dry_run:
            for point in points:
                print(shlex.join([sys.executable, "-m", "launcher.run", sweep.base, *point.overrides]))
            return 0
        for point in points:
            validate_run_dir(point.config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    left = [point for point in points if not point.finished]
    print(f"{len(points)} points, {len(points) - len(left)} of them finished before, {concurrent} at a time", file=sys.stderr, flush=True)
    grid = Grid(sweep.base, left, concurrent, gpus)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, grid.stop)
    code = grid.run()
    if code == ExitCode.FINISHED and len(points) > 1:
        folders = shlex.join(str(point.folder) for point in points)
        print(f"side by side: python -m swax_megatron.eval.compare {folders} --out {sweep.run_dir}/comparison", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
