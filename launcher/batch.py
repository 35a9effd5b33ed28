"""What the batch script asks (slurm/common.sh): ``prepare`` before the first step of a job, ``decide`` after each one.

Both print one line for the shell on stdout and everything for people on stderr.

    prepare  ->  run_dir <TAB> snapshot                    exit code 2 after one sentence where nothing can be started
    decide   ->  action <TAB> exit code <TAB> seconds <TAB> reason
    begin                                                  writes down a start that had to wait
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.points import point
from launcher.policy import Action, Ledger, decide, give_up, outcome
from launcher.preflight import VERDICT
from launcher.run import make_plan
from launcher.snapshot import absolute, take
from launcher.supervise import add_limits, limits_of
from swax_megatron.config import load_config
from swax_megatron.errors import ExitCode
from swax_megatron.validate import validate_run_dir

EPILOG = """\
example:
  python -m launcher.batch prepare configs/demo.yaml train.steps=50 --job 17 --name 17_0 --nodes 2 --home .
  python -m launcher.batch decide --run-dir runs/quickstart --job 17 --name 17_0 --next 17_0.1 --code 137
  python -m launcher.batch begin --run-dir runs/quickstart --job 17 --name 17_0.1
"""


def prepare(options: argparse.Namespace) -> str:
    """Check the configuration against this allocation, freeze it with the code, and write the start down.

    Raises ValueError where the run cannot start; RuntimeError where the job's earlier starts say that it should not.
    """
    overrides = [*options.overrides, *(point(options.sweep) if options.sweep else [])]
    config = absolute(load_config(options.config, overrides))
    plan = make_plan(config, [options.config, *overrides], None, options.nodes)
    print(plan.describe(config), file=sys.stderr)
    if options.dry_run:
        return f"{config.run_dir}\t{config.run_dir}/snapshots/{options.job}"
    validate_run_dir(config)
    ledger = Ledger(Path(config.run_dir))
    other = in_use(ledger, options.job)
    if other:
        raise ValueError(f"run_dir={config.run_dir!r} is used by job {other}, which is running: name another run_dir, or cancel that job")
    refused = give_up(ledger.starts(options.job), ledger.step(), limits_of(options))
    if refused:
        raise RuntimeError(refused)
    snapshot = take(config, options.home, options.job)
    ledger.begin(options.job, options.name)
    return f"{config.run_dir}\t{snapshot}"


def in_use(ledger: Ledger, job: str) -> str | None:
    """The job that made the newest start of the run, where it is another one and Slurm says that it runs."""
    newest = ledger.all()[-1:]
    if not newest or newest[0].job == job or not re.fullmatch(r"\d+(-\d+)?", newest[0].job):
        return None
    other = newest[0].job
    if shutil.which("squeue") is None:
        print(f"no squeue here: whether job {other} still uses {ledger.run_dir} is not known", file=sys.stderr)
        return None
    asked = ["squeue", "-h", "-t", "RUNNING,SUSPENDED", "-o", "%A", "-j", other.replace("-", "_")]
    return other if subprocess.run(asked, capture_output=True, text=True).stdout.strip() else None


def judge(options: argparse.Namespace) -> str:
    """The decision after a step of the job ended. A restart without delay is written down at once."""
    ledger, logs = Ledger(options.run_dir), options.run_dir / "logs" / options.name
    codes = [json.loads(path.read_text())["code"] for path in [*logs.glob("node_*.json"), *logs.glob(VERDICT)]]
    # srun itself, and a Python that does not start, end with 1 too: only who wrote it down has meant it
    given = ExitCode.CRASHED if options.code == ExitCode.RUN_ERROR and ExitCode.RUN_ERROR not in codes else options.code
    code = outcome([*codes, given], options.signalled) if given else ExitCode.FINISHED
    starts = ledger.starts(options.job)
    decision = decide(code, starts, ledger.step(), limits_of(options), slurm=True, signalled=options.signalled, held=ledger.held())
    if decision.action is Action.RESTART and not decision.delay:
        ledger.begin(options.job, options.next)
    return f"{decision.action.value}\t{int(decision.code)}\t{decision.delay:.0f}\t{decision.reason}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.batch", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="before the first step of a job")
    first.add_argument("config")
    first.add_argument("overrides", nargs="*", metavar="section.field=value")
    first.add_argument("--nodes", type=int, required=True)
    first.add_argument("--home", type=Path, required=True, help="the project's folder")
    first.add_argument("--sweep", help="file of launcher.submit --sweep and the point: FILE:INDEX")
    first.add_argument("--dry-run", action="store_true", help="check only")
    second = commands.add_parser("decide", help="after a step ended")
    second.add_argument("--run-dir", type=Path, required=True)
    second.add_argument("--next", required=True, metavar="NAME", help="of the start that would follow in this allocation")
    second.add_argument("--code", type=int, required=True, help="exit code of srun")
    second.add_argument("--signalled", action="store_true", help="the time limit was announced")
    third = commands.add_parser("begin", help="when the delay before a start is over")
    third.add_argument("--run-dir", type=Path, required=True)
    for command in (first, second, third):
        command.add_argument("--job", required=True, help="Slurm job id")
        command.add_argument("--name", required=True, help="of this start: JOB_RESTART or JOB_RESTART.ATTEMPT")
        add_limits(command)
    options = parser.parse_args(argv)
    try:
        if options.command == "begin":
            Ledger(options.run_dir).begin(options.job, options.name)
        else:
            print(prepare(options) if options.command == "prepare" else judge(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.RUN_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
