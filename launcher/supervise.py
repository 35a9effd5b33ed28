"""Keep a run going on this machine: start it again after crashes and hangs, stop when that does not help.

Started again: crashes, hangs (exit code 76), a run that was told to stop (75). Not: finished (0), mistakes (2), runs that
cannot go on (1). Before a start that would repeat one without a gained step it waits, each time twice as long; after
--patience of them, or --restarts in all, it stops with the run's exit code. SIGTERM, SIGINT and SIGUSR1 to this program
stop the run (it saves) and end it with 75. In a Slurm job slurm/common.sh does the same by the same rules (launcher/policy.py).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.policy import Action, Ledger, Limits, decide
from swax_megatron.config import load_config

EPILOG = """\
example:
  python -m launcher.supervise configs/demo.yaml train.steps=50
  python -m launcher.supervise configs/demo.yaml --patience 5 --delay 30 -- --processes 2
"""


class Supervisor:
    """Starts a command until the policy says that it is over. command: gets ``--name NAME`` appended."""

    def __init__(self, command: Sequence[str], run_dir: Path, limits: Limits) -> None:
        self.command, self.ledger, self.limits = list(command), Ledger(run_dir), limits
        self.job = f"{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        self.child: subprocess.Popen | None = None
        self.told = threading.Event()
        self.pending: int | None = None  # a signal that no child has had yet

    def stop(self, number: int, _: object) -> None:
        """Signal handler: pass the signal on once; the run saves and ends."""
        if not self.told.is_set():
            self.told.set()
            self.pending = number
            self._pass_on()

    def _pass_on(self) -> None:
        if self.pending is not None and self.child is not None and self.child.poll() is None:
            number, self.pending = self.pending, None
            self.child.send_signal(number)

    def run(self) -> int:
        """Until the end; the exit code."""
        for attempt in range(sys.maxsize):
            name = self.job if attempt == 0 else f"{self.job}.{attempt}"
            self.ledger.begin(self.job, name)
            self.child = subprocess.Popen([*self.command, "--name", name], start_new_session=True)
            self._pass_on()  # one that came while there was no child
            code = self.child.wait()
            code = code if code >= 0 else 128 - code
            starts, step = self.ledger.starts(self.job), self.ledger.step()
            decision = decide(code, starts, step, self.limits, slurm=False, signalled=self.told.is_set(), held=self.ledger.held())
            print(f"supervise: {decision.action.value}: {decision.reason}", file=sys.stderr, flush=True)
            if decision.action is not Action.RESTART:
                return decision.code
            if decision.delay:
                print(f"supervise: next start in {decision.delay:.0f} s", file=sys.stderr, flush=True)
            if self.told.wait(decision.delay):
                return decide(code, [], self.ledger.step(), self.limits, slurm=False, signalled=True).code
        raise AssertionError("the budget ends every run before")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The policy's numbers as options."""
    usual = Limits()
    parser.add_argument("--restarts", type=int, default=usual.restarts, metavar="N", help="restarts in all (default: %(default)s)")
    parser.add_argument(
        "--patience", type=int, default=usual.patience, metavar="N", help="starts in a row that gain no step (default: %(default)s)"
    )
    parser.add_argument(
        "--delay", type=float, default=usual.delay, metavar="S", help="seconds before the first repetition (default: %(default)s)"
    )
    parser.add_argument("--longest", type=float, default=usual.longest, metavar="S", help="longest wait, seconds (default: %(default)s)")


def limits_of(options: argparse.Namespace) -> Limits:
    """Raises ValueError for numbers that make no sense."""
    if options.restarts < 0 or options.patience < 1:
        raise ValueError(f"--restarts {options.restarts} --patience {options.patience}: restarts must be 0 or more, patience 1 or more")
    if options.delay < 0 or options.longest < options.delay:
        raise ValueError(f"--delay {options.delay} --longest {options.longest}: give seconds, the longest not below the first")
    return Limits(options.restarts, options.patience, options.delay, options.longest)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.supervise",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides; after -- further options of launcher.run")
    add_limits(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_intermixed_args(given[:cut])
    try:
        limits = limits_of(options)
        config = load_config(options.config, options.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "launcher.run", options.config, *options.overrides, *given[cut + 1 :]]
    supervisor = Supervisor(command, Path(config.run_dir), limits)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, supervisor.stop)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
