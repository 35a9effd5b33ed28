"""Start a training run: check everything, then one worker process a rank. One launcher a node.

The number of processes follows from the configuration and the devices; the model-parallel size (tensor x pipeline x
context) must divide it, and what remains is data parallelism. Workers are started by torch's elastic agent, so a rank
that dies ends the others, and SIGTERM and SIGINT reach all of them. Exit codes: 2 for a mistake in the configuration
(nothing was started), 75 when the run was told to stop and saved, 128 + n when signal n ended it unsaved, else the code
of the worker that failed first (``swax_megatron.errors.ExitCode``).

On several nodes the same command runs once on each, with --nodes, --node-rank and --rendezvous (slurm/common.sh does it).
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.agent import Place, run_workers
from swax_megatron.config import describe, load_config, to_yaml
from swax_megatron.errors import ExitCode
from swax_megatron.schema import Config
from swax_megatron.validate import model_parallel_size, validate, validate_inputs, validate_run_dir

EPILOG = """\
example:
  python -m launcher.run configs/demo.yaml train.steps=50
  python -m launcher.run configs/demo.yaml run_dir=runs/wide parallel.tensor=1 --processes 2
  python -m launcher.run configs/swax_7b.yaml --nodes 2 --node-rank 0 --rendezvous node01:29500 --name first  # rank 1 on node02

Every field of the configuration can be overridden:
"""


@dataclass(frozen=True)
class Plan:
    """What will be started on this node. processes, gpus: of this node, gpus 0 on the CPU; nodes: all that do the same."""

    processes: int
    gpus: int
    data_parallel: int
    environment: dict[str, str]
    command: tuple[str, ...]
    nodes: int = 1

    def describe(self, config: Config) -> str:
        """One line for people."""
        layout = config.parallel
        place = f"{self.gpus} GPU(s)" if self.gpus else "the CPU"
        shared = ", sharing over gloo" if 0 < self.gpus < self.processes else ""
        nodes = f"{self.nodes} nodes with " if self.nodes > 1 else ""
        return (
            f"{nodes}{self.processes} process(es) on {place}{shared}: tensor {layout.tensor} x pipeline {layout.pipeline} x "
            f"context {layout.context} x data {self.data_parallel}; {self.environment['OMP_NUM_THREADS']} thread(s) each"
        )


def choose_processes(config: Config, gpus: int, requested: int | None, nodes: int = 1) -> int:
    """The number of worker processes in all; raises ValueError when the layout does not fit the devices.

    gpus: of one node (all nodes are alike); requested: processes in all, None to choose.
    """
    size = model_parallel_size(config)
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x context {config.parallel.context} = {size}"
    there = nodes * gpus
    if requested is not None:
        if requested < 1 or requested % size:
            raise ValueError(f"--processes {requested}: must be a multiple of the model-parallel size ({layout})")
        if requested % nodes:
            raise ValueError(f"--processes {requested}: must be a multiple of the {nodes} nodes, which all start as many")
        processes = requested
    elif there < size or not gpus:  # on the CPU, and where a model-parallel group shares GPUs
        processes = math.lcm(size, nodes)
    elif there % size:
        where = f"{gpus} GPUs" if nodes == 1 else f"{nodes} nodes x {gpus} GPUs"
        step = math.lcm(size, nodes)
        otherwise = f"--processes {there // step * step}" if there >= step else "another number of nodes"
        raise ValueError(
            f"parallel.tensor={config.parallel.tensor}: {where} cannot be divided by the model-parallel size ({layout}); "
            f"use a size that divides {there}, or {otherwise}"
        )
    else:
        processes = there
    if gpus and nodes > 1 and processes > there:
        raise ValueError(
            f"parallel.tensor={config.parallel.tensor}: the model-parallel size ({layout}) is more than {nodes} nodes x {gpus} GPUs; "
            "ask for more nodes or use a smaller layout"
        )
    if 0 < gpus < processes // nodes and config.parallel.pipeline > 1:
        raise ValueError(
            f"parallel.pipeline={config.parallel.pipeline}: {processes} processes would share {gpus} GPU(s) over gloo, which cannot "
            "send GPU tensors point to point; use parallel.pipeline=1 or a GPU for every process"
        )
    return processes


def check_fit(config: Config, nodes: int, gpus: int) -> int:
    """The processes that would be started on nodes with ``gpus`` each (0: on the CPU); ValueError where the configuration does not fit."""
    validate(config, cuda=gpus > 0)
    processes = choose_processes(config, gpus, None, nodes)
    validate(config, processes, cuda=gpus > 0)
    validate_inputs(config)
    return processes


def make_plan(config: Config, arguments: Sequence[str], requested: int | None, nodes: int = 1) -> Plan:
    """Check the configuration against this machine. arguments: what the workers get (config path, overrides)."""
    if nodes < 1:
        raise ValueError(f"--nodes {nodes}: must be 1 or more")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    validate(config)
    processes = choose_processes(config, gpus, requested, nodes)
    validate(config, processes)
    validate_inputs(config)
    here = processes // nodes
    threads = config.train.threads or max(1, len(os.sched_getaffinity(0)) // here)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600"),  # time to save after SIGTERM
    }
    if nodes == 1:
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # never the outside network
    if gpus and config.parallel.tensor > 1 and config.parallel.overlap:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # kernels begin in the order in which they are launched: transfers first
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return Plan(
        processes=here,
        gpus=min(gpus, here),
        data_parallel=processes // model_parallel_size(config),
        environment=environment,
        command=(sys.executable, "-m", "swax_megatron.train", *arguments),
        nodes=nodes,
    )


def make_place(arguments: argparse.Namespace) -> Place:
    """This agent's place, from --nodes and its companions."""
    named = {"name": arguments.name} if arguments.name else {}
    if arguments.nodes == 1:
        return Place(**named)
    if arguments.node_rank is None or not 0 <= arguments.node_rank < arguments.nodes:
        raise ValueError(f"--node-rank {arguments.node_rank}: with --nodes {arguments.nodes} give every node its own, from 0 on")
    host, _, port = (arguments.rendezvous or "").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--rendezvous {arguments.rendezvous}: with several nodes name the head node and a free port, e.g. node01:29500")
    if not arguments.name:
        raise ValueError("--name: with several nodes give all of them the same name of this start, e.g. --name first")
    address = os.environ.get("SLURMD_NODENAME") or socket.getfqdn()
    return Place(arguments.nodes, arguments.node_rank, arguments.rendezvous, address, **named)


def start(plan: Plan, run_dir: Path, place: Place | None = None) -> int:
    """Run this node's workers to the end and return the exit code. Logs lie under run_dir/logs, one file a rank."""
    os.environ.update(plan.environment)
    return run_workers(plan.processes, plan.command, run_dir, place or Place())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.run",
        description="Train on this machine (CPU processes over gloo, or its GPUs), or as one of several nodes.",
        epilog=EPILOG + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    parser.add_argument("--processes", type=int, metavar="N", help="workers in all (default: one a GPU; on the CPU one copy of the model)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that run this command (default: this one alone)")
    rank = os.environ.get("SLURM_NODEID", "")
    parser.add_argument(
        "--node-rank", type=int, metavar="N", default=int(rank) if rank else None, help="this node's number (default: SLURM_NODEID)"
    )
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where the nodes meet: node 0 and a free port")
    parser.add_argument("--name", help="of this start: logs lie in run_dir/logs/NAME (default: the time)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the resolved configuration, start nothing")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        plan = make_plan(config, [arguments.config, *arguments.overrides], arguments.processes, arguments.nodes)
        if not arguments.dry_run:
            place = make_place(arguments)
            validate_run_dir(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    print(plan.describe(config), file=sys.stderr)
    if arguments.dry_run:
        print("# " + " ".join(f"{key}={value}" for key, value in plan.environment.items()) + " " + shlex.join(plan.command))
        print(to_yaml(config), end="")
        return 0
    try:
        return start(plan, Path(config.run_dir), place)
    except Exception:  # of the agent, not of the run: code 1 would say that the run cannot go on
        traceback.print_exc()
        return ExitCode.CRASHED


if __name__ == "__main__":
    sys.exit(main())
