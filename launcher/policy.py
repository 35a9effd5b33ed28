"""Whether a run that ended is started again: by its exit code, what it gained, and a budget.

A start that ends without a newer complete checkpoint than it began with has gained nothing. Several such starts in a
row mean that starting again does not help; the run stops and says so, instead of requeueing for ever.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from swax_megatron.checkpoint.folder import newest_step
from swax_megatron.errors import ExitCode
from swax_megatron.resilience import STOP_FILE

SIGNALLED = (128 + 2, 128 + 10, 128 + 15)  # an agent that was told to stop: SIGINT, SIGUSR1, SIGTERM


class Action(str, Enum):
    """What to do with a run that ended."""

    FINISH = "finish"
    STOP = "stop"
    RESTART = "restart"  # here, on the same nodes
    REQUEUE = "requeue"  # Slurm: in a new allocation


@dataclass(frozen=True)
class Limits:
    """restarts: in all; patience: starts in a row without a gained step; delay, longest: seconds before a fruitless one is repeated."""

    restarts: int = 100
    patience: int = 3
    delay: float = 10.0
    longest: float = 600.0


@dataclass(frozen=True)
class Start:
    """One start of a run. job: the Slurm job or supervisor; step: of the newest complete checkpoint then, -1 for none."""

    job: str
    name: str
    step: int
    time: float


@dataclass(frozen=True)
class Decision:
    """action, the exit code to end with, seconds to wait before a restart, and one sentence of why."""

    action: Action
    code: int
    delay: float
    reason: str


class Ledger:
    """``run_dir/starts.jsonl``: every start of a run, one JSON line each."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "starts.jsonl"

    def step(self) -> int:
        """The step of the newest complete checkpoint; -1 where there is none."""
        return newest_step(self.run_dir / "checkpoints")

    def begin(self, job: str, name: str) -> None:
        """Write down that a start of the run happens now."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Start(job, name, self.step(), time.time()))) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def held(self) -> bool:
        """Whether the file STOP is in the run directory: then no start is allowed."""
        return (self.run_dir / STOP_FILE).exists()

    def starts(self, job: str) -> list[Start]:
        """The starts of one job, oldest first."""
        return [start for start in self.all() if start.job == job]

    def all(self) -> list[Start]:
        """Every start of the run, oldest first; a line that a crash cut short is passed over."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(Start(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return found


def fruitless(starts: list[Start], step: int) -> int:
    """How many of the last starts began at the step where the run still is."""
    count = 0
    for start in reversed(starts):
        if start.step != step:
            break
        count += 1
    return count


def outcome(codes: Iterable[int], signalled: bool = False) -> int:
    """The exit code of a run from those of its nodes: what tells most comes first.

    A mistake of the user or a run error on one node makes its peers crash when their connections break, and a crash on
    one node gets the others stopped by a signal.
    """
    given = list(codes)
    for telling in (ExitCode.USER_ERROR, ExitCode.RUN_ERROR, ExitCode.UNHEALTHY_NODE, ExitCode.HUNG):
        if telling in given:
            return telling
    crashes = [code for code in given if code not in (ExitCode.FINISHED, ExitCode.PREEMPTED, *SIGNALLED)]
    stopped = [code for code in given if code in (ExitCode.PREEMPTED, *SIGNALLED)]
    if signalled and stopped:
        return ExitCode.PREEMPTED
    if crashes:
        return crashes[0]
    if ExitCode.PREEMPTED in stopped:
        return ExitCode.PREEMPTED
    return stopped[0] if stopped else ExitCode.FINISHED


def give_up(starts: list[Start], step: int, limits: Limits) -> str | None:
    """Why a further start is refused, or None."""
    where = f"step {step}" if step >= 0 else "no checkpoint"
    vain = fruitless(starts, step)
    if vain >= limits.patience:
        return f"{vain} starts in a row gained no step ({where}): starting again does not help, look at the logs"
    if len(starts) > limits.restarts:
        return f"the budget of {limits.restarts} restarts is spent ({where})"
    return None


def decide(
    code: int, starts: list[Start], step: int, limits: Limits, *, slurm: bool, signalled: bool = False, held: bool = False
) -> Decision:
    """What to do after a run ended with ``code`` at ``step`` (newest complete checkpoint).

    signalled: this supervisor or batch script was itself told to stop (on Slurm: by the time limit)
    held: the file STOP is in the run directory, which refuses every further start
    """
    if code == ExitCode.FINISHED:
        return Decision(Action.FINISH, code, 0.0, "finished")
    if code == ExitCode.USER_ERROR:
        return Decision(Action.STOP, code, 0.0, "a mistake in the input: it would end the same way again")
    if code == ExitCode.RUN_ERROR:
        return Decision(Action.STOP, code, 0.0, "the run cannot go on by itself")
    if held:
        return Decision(Action.STOP, ExitCode.PREEMPTED, 0.0, f"the file {STOP_FILE} is in the run directory: remove it and start again")
    if signalled and not slurm:
        return Decision(Action.STOP, ExitCode.PREEMPTED, 0.0, "told to stop; the same command goes on from the newest checkpoint")
    refused = give_up(starts, step, limits)
    if refused:
        return Decision(Action.STOP, code, 0.0, refused)
    vain = fruitless(starts, step)
    delay = min(limits.longest, limits.delay * 2 ** (vain - 1)) if vain else 0.0
    if slurm and signalled:
        return Decision(Action.REQUEUE, ExitCode.PREEMPTED, 0.0, "the time of this allocation is over")
    if code == ExitCode.PREEMPTED:
        return Decision(Action.REQUEUE if slurm else Action.RESTART, code, 0.0, "told to stop")
    if code == ExitCode.UNHEALTHY_NODE:
        if slurm:
            return Decision(Action.REQUEUE, code, 0.0, "a node failed its checks")
        return Decision(Action.STOP, code, 0.0, "this machine failed its checks")
    cause = "the watchdog ended a hang" if code == ExitCode.HUNG else f"exit code {code}"
    return Decision(Action.RESTART, code, delay, f"{cause}; start again from step {step}" if step >= 0 else f"{cause}; start again")
