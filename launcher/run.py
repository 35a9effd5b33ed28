"""Start a training run on this machine: check everything, then one worker process a rank.

The number of processes follows from the configuration and the devices; the model-parallel size (tensor x pipeline x
context) must divide it, and what remains is data parallelism. Workers are started by torch's elastic agent, so a rank
that dies ends the others, and SIGTERM and SIGINT reach all of them. Exit codes: 2 for a mistake in the configuration
(nothing was started), 75 when the run was told to stop and saved, 128 + n when signal n ended it unsaved, else the code
of the worker that failed first (``swax_megatron.errors.ExitCode``).
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from swax_megatron.config import describe, load_config, to_yaml
from swax_megatron.errors import ExitCode
from swax_megatron.resilience.events import ended_with, size
from swax_megatron.schema import Config
from swax_megatron.validate import model_parallel_size, validate, validate_inputs, validate_run_dir

EPILOG = """\
example:
  python -m launcher.run configs/demo.yaml train.steps=50
  python -m launcher.run configs/demo.yaml run_dir=runs/wide parallel.tensor=1 --processes 2

Every field of the configuration can be overridden:
"""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # an unlisted one would end the agent and leave the workers behind


@dataclass(frozen=True)
class Plan:
    """What will be started. gpus: GPUs that are used, 0 on the CPU."""

    processes: int
    gpus: int
    data_parallel: int
    environment: dict[str, str]
    command: tuple[str, ...]

    def describe(self, config: Config) -> str:
        """One line for people."""
        layout = config.parallel
        place = f"{self.gpus} GPU(s)" if self.gpus else "the CPU"
        shared = ", sharing over gloo" if 0 < self.gpus < self.processes else ""
        return (
            f"{self.processes} process(es) on {place}{shared}: tensor {layout.tensor} x pipeline {layout.pipeline} x "
            f"context {layout.context} x data {self.data_parallel}; {self.environment['OMP_NUM_THREADS']} thread(s) each"
        )


def choose_processes(config: Config, gpus: int, requested: int | None) -> int:
    """The number of worker processes; raises ValueError when the layout does not fit the devices."""
    size = model_parallel_size(config)
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x context {config.parallel.context} = {size}"
    if requested is not None:
        if requested < 1 or requested % size:
            raise ValueError(f"--processes {requested}: must be a multiple of the model-parallel size ({layout})")
        processes = requested
    elif gpus < size:  # on the CPU, and where a model-parallel group shares GPUs
        processes = size
    elif gpus % size:
        raise ValueError(
            f"parallel.tensor={config.parallel.tensor}: {gpus} GPUs cannot be divided by the model-parallel size ({layout}); "
            f"use a size that divides {gpus}, or --processes {gpus // size * size}"
        )
    else:
        processes = gpus
    if 0 < gpus < processes and config.parallel.pipeline > 1:
        raise ValueError(
            f"parallel.pipeline={config.parallel.pipeline}: {processes} processes would share {gpus} GPU(s) over gloo, which cannot "
            "send GPU tensors point to point; use parallel.pipeline=1 or a GPU for every process"
        )
    return processes


def make_plan(config: Config, arguments: Sequence[str], requested: int | None) -> Plan:
    """Check the configuration against this machine. arguments: what the workers get (config path, overrides)."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    validate(config)
    processes = choose_processes(config, gpus, requested)
    validate(config, processes)
    validate_inputs(config)
    threads = config.train.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # one machine: never the outside network
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"),  # time to save after SIGTERM
    }
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return Plan(
        processes=processes,
        gpus=min(gpus, processes),
        data_parallel=processes // model_parallel_size(config),
        environment=environment,
        command=(sys.executable, "-m", "swax_megatron.train", *arguments),
    )


def start(plan: Plan, run_dir: Path) -> int:
    """Run the workers to the end and return the exit code. Logs of every rank lie under run_dir/logs."""
    os.environ.update(plan.environment)
    before = size(run_dir)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is reported below, in one line
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.processes,
        run_id="run",
        role="",  # with the template below: no prefix on rank 0's lines
        log_line_prefix_template="${role_name}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=SIGNALS,
        logs_specs=DefaultLogsSpecs(log_dir=str(run_dir / "logs"), redirects=Std.ALL, tee=Std.ALL, local_ranks_filter={0}),
    )
    try:
        elastic_launch(settings, plan.command[0])(*plan.command[1:])
    except ChildFailedError as failure:
        code = _report(failure, run_dir)
    except SignalException as stop:
        print(f"stopped by {stop.sigval.name}; every rank was told", file=sys.stderr)
        code = 128 + stop.sigval
    else:
        return ExitCode.FINISHED
    # the agent tells no code after a signal, and of ranks that end within a second any one's: the run itself knows better
    told = ended_with(run_dir, before)
    return told if told in (ExitCode.FINISHED, ExitCode.PREEMPTED, ExitCode.HUNG) else code


def _told_on_console(run_dir: Path, log: Path | None) -> bool:
    """Whether a worker ended with a sentence ("error: ..."); where rank 0 was ended before it could tell it, tell it here."""
    sentence = _sentence(log)
    if sentence is not None and _sentence(log.parent.parent / "0" / "stderr.log") is None:
        print(sentence, file=sys.stderr)
    return sentence is not None


def _sentence(log: Path | None) -> str | None:
    if log is None or not log.exists():
        return None
    return next((line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")), None)


def _cause(failure: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank that failed first; among those of one second, one that is no consequence (a lost peer, the agent's signal)."""
    first = failure.get_first_failure()[1].timestamp
    close = [(rank, each) for rank, each in sorted(failure.failures.items()) if each.timestamp <= first + 1]
    return next((one for one in close if one[1].exitcode not in (ExitCode.CRASHED, -signal.SIGTERM)), close[0])


def _report(failure: ChildFailedError, run_dir: Path) -> int:
    rank, first = _cause(failure)
    code = first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    cause = f"exit code {first.exitcode}" if first.exitcode >= 0 else f"signal {-first.exitcode}"
    log = next(iter(sorted(run_dir.glob(f"logs/*/attempt_0/{rank}/stderr.log"), key=lambda p: p.stat().st_mtime, reverse=True)), None)
    if first.exitcode == ExitCode.PREEMPTED:
        print("stopped as it was told, and saved; the same command continues it", file=sys.stderr)
        return code
    if first.exitcode in (ExitCode.RUN_ERROR, ExitCode.USER_ERROR) and _told_on_console(run_dir, log):
        return code  # a user's error or a run that cannot go on: its one sentence is enough
    code = ExitCode.CRASHED if code == ExitCode.RUN_ERROR else code  # no sentence: the interpreter or a library ended it
    if rank != 0 and log is not None:  # rank 0's lines are on the console already
        print("".join(f"  {line}\n" for line in log.read_text(errors="replace").splitlines()[-20:]), end="", file=sys.stderr)
    print(f"rank {rank} ended first, with {cause}; its log: {log}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.run",
        description="Train on this machine: CPU processes over gloo, or its GPUs.",
        epilog=EPILOG + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    parser.add_argument("--processes", type=int, metavar="N", help="workers (default: one a GPU; on the CPU the model-parallel size)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the resolved configuration, start nothing")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        plan = make_plan(config, [arguments.config, *arguments.overrides], arguments.processes)
        if not arguments.dry_run:
            validate_run_dir(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    print(plan.describe(config), file=sys.stderr)
    if arguments.dry_run:
        print("# " + " ".join(f"{key}={value}" for key, value in plan.environment.items()) + " " + shlex.join(plan.command))
        print(to_yaml(config), end="")
        return 0
    return start(plan, Path(config.run_dir))


if __name__ == "__main__":
    sys.exit(main())
