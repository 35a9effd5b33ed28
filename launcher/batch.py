"""What the batch script asks (slurm/common.sh): ``prepare`` before the first step of a job, ``decide`` after each one.

Both print one line for the shell on stdout and everything for people on stderr.

    prepare  ->  run_dir <TAB> snapshot                    exit code 2 after one sentence where nothing can be started
    decide   ->  action <TAB> exit code <TAB> seconds <TAB> reason
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.policy import Action, Ledger, decide, give_up, outcome
from launcher.run import make_plan
from launcher.snapshot import absolute, take
from launcher.supervise import add_limits, limits_of
from launcher.sweep import point
from swax_megatron.config import load_config
from swax_megatron.errors import ExitCode
from swax_megatron.validate import validate_run_dir

EPILOG = """\
example:
  python -m launcher.batch prepare configs/demo.yaml train.steps=50 --job 17 --name 17_0 --nodes 2 --home .
  python -m launcher.batch decide --run-dir runs/quickstart --job 17 --name 17_0 --code 137
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
    refused = give_up(ledger.starts(options.job), ledger.step(), limits_of(options))
    if refused:
        raise RuntimeError(refused)
    snapshot = take(config, options.home, options.job)
    ledger.begin(options.job, options.name)
    return f"{config.run_dir}\t{snapshot}"


def judge(options: argparse.Namespace) -> str:
    """The decision after a step of the job ended; a restart is written down at once."""
    ledger = Ledger(options.run_dir)
    codes = [json.loads(path.read_text())["code"] for path in (options.run_dir / "logs" / options.name).glob("node_*.json")]
    code = outcome([*codes, options.code], options.signalled) if options.code else ExitCode.FINISHED
    starts = ledger.starts(options.job)
    decision = decide(code, starts, ledger.step(), limits_of(options), slurm=True, signalled=options.signalled)
    if decision.action is Action.RESTART:
        ledger.begin(options.job, f"{options.job}.{len(starts)}")
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
    second.add_argument("--code", type=int, required=True, help="exit code of srun")
    second.add_argument("--signalled", action="store_true", help="the time limit was announced")
    for command in (first, second):
        command.add_argument("--job", required=True, help="Slurm job id")
        command.add_argument("--name", required=True, help="of this start: JOB_RESTART or JOB_RESTART.ATTEMPT")
        add_limits(command)
    options = parser.parse_intermixed_args(argv) if argv is not None else parser.parse_args()
    try:
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
