"""Check every node before training, and name the ones that are broken or slow.

``measure`` runs once on every node: its devices (count, ECC errors, Xid messages, clocks), free disk and memory, clock,
versions, the speed of a matrix product on each device, and of an all-reduce with its two neighbours. It writes one JSON
report. ``judge`` reads them all: a node without a report, with a fault, or far slower than the median is named on stdout, and
the exit code is 77 (1 where all of them are, 70 where none reported); preflight.json, beside the reports' folder, says the same.
Below four nodes there is no median to trust: absolute floors count alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from launcher.checks import Floors, compare, node_report
from launcher.neighbours import Meeting
from swax_megatron.errors import ExitCode

VERDICT = "preflight.json"
OWN_SECONDS = 180.0  # for a node's own tools and matrix products
EPILOG = """\
example:
  srun --ntasks-per-node=1 python -m launcher.preflight measure --reports runs/x/preflight --nodes 2 --store node01:11234
  python -m launcher.preflight judge --reports runs/x/preflight --expect node01,node02 --min-bandwidth 5
  python -m launcher.preflight measure --reports /tmp/preflight && python -m launcher.preflight judge --reports /tmp/preflight
"""


def measure(options: argparse.Namespace) -> int:
    """This node's report, written whole or not at all."""
    meeting = Meeting.of_environment(options.nodes, options.store, options.timeout)
    # a driver or a network that hangs cannot be waited for: stacks to stderr, and out; what was written stands
    faulthandler.dump_traceback_later(budget(options), exit=True)
    report = node_report(meeting.name, options.folder)
    target = options.reports / f"{meeting.name}.json"
    options.reports.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        aside = target.with_name(f"{target.name}.tmp")
        aside.write_text(json.dumps(report, indent=1), encoding="utf-8")
        aside.replace(target)

    write()  # what this node knows by itself: it stands even where the network fails
    if options.nodes > 1:
        if report["gpus"]:  # a collective that times out raises instead of ending the process
            os.environ.update(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0")
        report |= meeting.measure(report["gpus"] > 0)
        write()
    faulthandler.cancel_dump_traceback_later()
    return 0


def budget(options: argparse.Namespace) -> float:
    """Seconds after which ``measure`` ends itself: its tools, products and everything it waits for have had their time."""
    return OWN_SECONDS + (Meeting("", 0, options.nodes, "", options.timeout).longest if options.nodes > 1 else 0.0)


def judge(options: argparse.Namespace) -> int:
    """Prints the unfit nodes, comma-separated, on stdout, and what is wrong with each on stderr."""
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.reports.glob("*.json"))}
    expected = options.expect.split(",") if options.expect else sorted(reports)
    if not expected:
        raise ValueError(f"--reports {options.reports}: holds no report; run measure first")
    if not set(expected) & set(reports):
        print(f"error: no node reported in {options.reports}: the checks themselves could not run", file=sys.stderr)
        return ExitCode.CRASHED
    floors = Floors(**{name: getattr(options, name) for name in Floors.__dataclass_fields__})
    faults = compare(reports, expected, floors)
    for node in expected:
        said = "; ".join(faults.get(node, [])) or "fit"
        print(f"preflight: {node}: {said}{_speeds(reports.get(node, {}))}", file=sys.stderr)
    code = ExitCode.UNHEALTHY_NODE if faults else ExitCode.FINISHED
    if len(faults) == len(expected) > 1:
        print("error: every node failed the checks: mend what they share, or the limits (SWAX_PREFLIGHT_LIMITS)", file=sys.stderr)
        code = ExitCode.RUN_ERROR
    verdict = options.reports.parent / VERDICT
    aside = verdict.with_name(f"{VERDICT}.tmp-{os.getpid()}")
    aside.write_text(json.dumps({"code": int(code), "unfit": faults}, indent=1), encoding="utf-8")
    aside.replace(verdict)
    if code == ExitCode.UNHEALTHY_NODE:
        print(",".join(sorted(faults)))
    return code


def _speeds(report: dict) -> str:
    products = report.get("matmul_tflops") or []
    told = [f"{min(products):.3g} TFLOP/s"] if products else []
    if report.get("bandwidth") is not None:
        told.append(f"{report['bandwidth']:.3g} GB/s to its neighbours")
    return f" ({', '.join(told)})" if told else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.preflight", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("measure", help="on every node")
    first.add_argument("--nodes", type=int, default=1, help="nodes that measure together (default: 1)")
    first.add_argument("--store", metavar="HOST:PORT", help="where they meet: the node of rank 0 (SLURM_NODEID)")
    first.add_argument("--folder", type=Path, action="append", default=[], help="folder whose free space counts; several allowed")
    first.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for other nodes (default: 120)")
    second = commands.add_parser("judge", help="on one node, afterwards")
    second.add_argument("--expect", metavar="NODE,NODE", help="nodes that must have reported, by rank (default: those that did)")
    usual = Floors()
    for name, field in Floors.__dataclass_fields__.items():
        kind, meaning = type(getattr(usual, name)), field.metadata["doc"]
        second.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=getattr(usual, name), metavar="X", help=f"{meaning} (default: %(default)s)"
        )
    for command in (first, second):
        command.add_argument("--reports", type=Path, required=True, help="folder of the reports, seen by every node")
    options = parser.parse_args(argv)
    try:
        return measure(options) if options.command == "measure" else judge(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except Exception:  # code 1 would say that the run cannot go on
        traceback.print_exc()
        return ExitCode.CRASHED


if __name__ == "__main__":
    sys.exit(main())
