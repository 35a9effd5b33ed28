"""One agent a node: torch's elastic agent (what torchrun is), with one log file a rank and one exit code a run.

A rank that dies ends the others; SIGTERM, SIGINT and SIGUSR1 reach all of them. On several nodes the agents meet by c10d
rendezvous on the head node; ranks are contiguous on a node and nodes are ordered by address.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from swax_megatron.errors import ExitCode
from swax_megatron.resilience.events import ended_with, size

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # an unlisted one would end the agent and leave the workers behind
JOIN_SECONDS = 300  # how long agents wait for each other at the start
GRACE_SECONDS = 15.0  # how long an agent whose ranks failed waits for the others' ends


def _stamp() -> str:
    return f"{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}"


@dataclass(frozen=True)
class Place:
    """Where this agent stands.

    nodes, rank: number of agents and this one's place among them (rank 0 hosts the rendezvous)
    rendezvous: host:port on the head node; address: the name by which other nodes reach this one
    name: of this start of the run; logs of its ranks lie in run_dir/logs/<name>
    """

    nodes: int = 1
    rank: int = 0
    rendezvous: str = "localhost:0"
    address: str = "localhost"
    name: str = field(default_factory=_stamp)


class RankLogs(LogsSpecs):
    """``rank_<global rank>.log`` for each worker of this node; global rank 0's is shown on the console as well."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        folder = Path(self.root_log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        logs = {local: str(folder / f"rank_{env['RANK']}.log") for local, env in envs.items()}
        console = {local: path for local, path in logs.items() if envs[local]["RANK"] == "0"}
        errors = {local: str(folder / f"rank_{env['RANK']}.error.json") for local, env in envs.items()}
        return LogsDest(stdouts=dict.fromkeys(logs, ""), stderrs=logs, tee_stderrs=console, error_files=errors)

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)


def run_workers(processes: int, command: Sequence[str], run_dir: Path, place: Place) -> int:
    """Start this node's workers, wait for their end and return the exit code of the run as this node saw it.

    processes: workers on this node. The code is also written to run_dir/logs/<name>/node_<rank>.json.
    """
    folder, before = run_dir / "logs" / place.name, size(run_dir)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is reported below, in one line
    settings = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=processes,
        run_id=place.name,
        role="",  # with the template below: no prefix on rank 0's lines
        log_line_prefix_template="${role_name}",
        rdzv_backend="c10d",
        rdzv_endpoint=place.rendezvous,
        rdzv_configs={"is_host": place.rank == 0, "join_timeout": JOIN_SECONDS, "read_timeout": JOIN_SECONDS},
        local_addr=place.address,
        max_restarts=0,
        signals_to_handle=SIGNALS,
        logs_specs=RankLogs(folder),
    )
    cause = "finished"
    # one file a rank holds what it prints and what it complains about, in order
    both_streams = ("/bin/sh", "-c", 'exec "$@" >&2', "worker", *command)
    try:
        elastic_launch(settings, both_streams[0])(*both_streams[1:])
        code = int(ExitCode.FINISHED)
    except ChildFailedError as failure:
        code, cause = _report(failure, folder)
    except SignalException as stop:
        code, cause = 128 + stop.sigval, f"stopped by {signal.Signals(stop.sigval).name}"
        print(f"{cause}; every rank was told", file=sys.stderr)
    except RendezvousError as error:
        code, cause = int(ExitCode.CRASHED), f"the {place.nodes} agents did not meet at {place.rendezvous} ({type(error).__name__})"
        print(f"{cause}: does every node resolve and reach the head node?", file=sys.stderr)
    # the agent tells no code after a signal, and of ranks that end within a second any one's: the run itself knows better
    told = ended_with(run_dir, before) if code else None
    if told in (ExitCode.FINISHED, ExitCode.PREEMPTED, ExitCode.HUNG):
        code = told
    _record(folder, place, code, cause)
    if code:
        _let_others_end(folder, place.nodes)
    return code


def _let_others_end(folder: Path, nodes: int) -> None:
    """srun kills every other node as soon as one agent leaves with an error: first let them write what they know."""
    deadline = time.monotonic() + GRACE_SECONDS
    while len(list(folder.glob("node_*.json"))) < nodes and time.monotonic() < deadline:
        time.sleep(0.1)


def _record(folder: Path, place: Place, code: int, cause: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"node_{place.rank}.json.tmp-{os.getpid()}"
    aside.write_text(json.dumps({"node": place.address, "code": code, "cause": cause}), encoding="utf-8")
    aside.replace(folder / f"node_{place.rank}.json")


def _told_on_console(folder: Path, log: Path) -> bool:
    """Whether a worker ended with a sentence ("error: ..."); where rank 0 was ended before it could tell it, tell it here."""
    sentence = _sentence(log)
    if sentence is not None and _sentence(folder / "rank_0.log") is None:
        print(sentence, file=sys.stderr)
    return sentence is not None


def _sentence(log: Path) -> str | None:
    if not log.exists():
        return None
    return next((line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")), None)


def _cause(failure: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank that failed first; among those of one second, one that is no consequence (a lost peer, the agent's signal)."""
    first = failure.get_first_failure()[1].timestamp
    close = [(rank, each) for rank, each in sorted(failure.failures.items()) if each.timestamp <= first + 1]
    return next((one for one in close if one[1].exitcode not in (ExitCode.CRASHED, -signal.SIGTERM)), close[0])


def _report(failure: ChildFailedError, folder: Path) -> tuple[int, str]:
    rank, first = _cause(failure)
    code = first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    cause = f"exit code {first.exitcode}" if first.exitcode >= 0 else f"signal {-first.exitcode}"
    log = folder / f"rank_{rank}.log"
    if first.exitcode == ExitCode.PREEMPTED:
        print("stopped as it was told, and saved; the same command continues it", file=sys.stderr)
        return code, "told to stop"
    if first.exitcode in (ExitCode.RUN_ERROR, ExitCode.USER_ERROR) and _told_on_console(folder, log):
        return code, _sentence(log) or cause  # a user's error or a run that cannot go on: its one sentence is enough
    code = int(ExitCode.CRASHED) if code == ExitCode.RUN_ERROR else code  # no sentence: the interpreter or a library ended it
    if rank != 0 and log.exists():  # rank 0's lines are on the console already
        print("".join(f"  {line}\n" for line in log.read_text(errors="replace").splitlines()[-20:]), end="", file=sys.stderr)
    print(f"rank {rank} ended first, with {cause}; its log: {log}", file=sys.stderr)
    return code, f"rank {rank} ended first, with {cause}"
