"""Submit training to Slurm, after everything that can be wrong was looked for on the login node.

Refused before anything is queued: a configuration that does not fit the nodes and GPUs, data that is missing, a run
directory that cannot be written or that another job of yours is using, an unknown partition, more nodes, GPUs or time than it
has, no scratch folder. Sweeps become job arrays, one run a point (launcher/points.py); --chain queues successors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.points import Sweep, read_sweep, write_points
from launcher.run import check_fit
from launcher.slurm import COMMENT, Job, Partition, ask, directive, duration, gpu_count, lead, our_jobs, partitions, read_site
from launcher.snapshot import absolute
from swax_megatron.checkpoint.folder import latest
from swax_megatron.config import load_config
from swax_megatron.errors import ExitCode
from swax_megatron.schema import Config
from swax_megatron.validate import model_parallel_size, validate_run_dir

HOME = Path(__file__).resolve().parent.parent
EPILOG = """\
example:
  python -m launcher.submit configs/demo.yaml train.steps=50 --nodes 2 --time 1:00:00 --dry-run
  python -m launcher.submit configs/swax_7b.yaml --nodes 16 --chain 3
  python -m launcher.submit --sweep sweep.yaml --nodes 1
  python -m launcher.submit --status; python -m launcher.submit --tail 1234 --follow; python -m launcher.submit --cancel 1234

a sweep file:
  base: configs/demo.yaml
  overrides: [train.steps=200]
  concurrent: 4
  grid: {optimizer.learning_rate: [1.0e-3, 3.0e-3], parallel.tensor: [1, 2]}
"""


def choose_partition(wanted: str | None, known: dict[str, Partition]) -> Partition:
    """The named one, or the cluster's default. Raises ValueError."""
    there = ", ".join(sorted(known)) or "none is up"
    if wanted is None:
        for partition in known.values():
            if partition.default:
                return partition
        raise ValueError(f"--partition: this cluster has no default; choose one of: {there} (or set SBATCH_PARTITION in slurm/site.sh)")
    if wanted not in known:
        raise ValueError(f"--partition {wanted}: this cluster has no such partition that is up; choose one of: {there}")
    return known[wanted]


def check_allocation(partition: Partition, nodes: int, gpus: int | None, limit: str | None, warning: int = 0) -> int:
    """GPUs a node of the job will have. Raises ValueError where the partition cannot give what is asked.

    limit: the job's time limit, from wherever; warning: seconds before it at which the ranks are told to save
    """
    if not 1 <= nodes <= partition.nodes:
        raise ValueError(f"--nodes {nodes}: partition {partition.name} has {partition.nodes} node(s)")
    if gpus is not None and gpus > partition.gpus:
        raise ValueError(f"--gpus-per-node {gpus}: the nodes of partition {partition.name} have {partition.gpus}")
    seconds = duration(limit) if limit else None
    if partition.seconds is not None and (seconds is None or seconds > partition.seconds):
        if limit:
            raise ValueError(f"--time {limit}: partition {partition.name} ends jobs after {partition.seconds // 60} minutes")
        seconds = partition.seconds
    if seconds is not None and seconds <= warning:
        raise ValueError(
            f"--time {limit or 'of the partition'}: the ranks are told to save {warning} s before the limit, which would be at the start; "
            "give more time, or a shorter lead, e.g. SBATCH_SIGNAL=B:USR1@120"
        )
    return partition.gpus if gpus is None else gpus


def check_run_dir(config: Config, scratch: str, queue: Sequence[Job], after: str | None) -> None:
    """A run directory must be seen by every node and belong to one job at a time. after: of --after, jobs that end before."""
    folder = os.path.abspath(config.run_dir)
    if os.path.commonpath([folder, os.path.abspath(scratch)]) == os.path.abspath(scratch) and os.path.abspath(scratch) != "/tmp":
        raise ValueError(f"run_dir={config.run_dir!r} lies in SWAX_SCRATCH={scratch}, which each node has for itself: use a shared folder")
    before = set(re.findall(r"\d+", after or ""))
    while more := {number for job in queue if job.id.partition("_")[0] in before for number in job.after} - before:
        before |= more  # what those wait for ends before them
    taken = [job.id for job in queue if job.run_dir == folder and job.id.partition("_")[0] not in before]
    if taken:
        raise ValueError(
            f"run_dir={config.run_dir!r} is used by job {', '.join(taken)}: name another run_dir, cancel that job, "
            f"or queue this one behind it with --after {taken[-1]}"
        )


def check_paths(config: Config, name: str) -> None:
    """A job runs in the project's folder, so relative paths must mean there what they mean here. Raises ValueError."""
    if Path.cwd() != HOME and absolute(config) != config:
        raise ValueError(f"{name}: has relative paths, which a job reads from {HOME}: submit from there, or write them absolute")


def command_line(options: argparse.Namespace, run_dir: str, name: str, tail: list[str], after: str | None, array: str | None) -> list[str]:
    """The sbatch command."""
    comment = COMMENT + (tail[tail.index("--sweep") + 1] if array else run_dir)
    words = ["sbatch", "--parsable", f"--nodes={options.nodes}", f"--job-name={name}", f"--comment={comment}"]
    words += [f"--output={run_dir}/slurm-%{'A_%a' if array else 'j'}.out", "--export=ALL"]
    for option, value in (
        ("partition", options.partition),
        ("account", options.account),
        ("time", options.time),
        ("gpus-per-node", options.gpus_per_node),
        ("array", array),
        ("dependency", after),
        ("exclude", options.exclude),
    ):
        words += [f"--{option}={value}"] if value else []
    return [*words, str(HOME / options.script), *tail]


def submit(options: argparse.Namespace) -> int:
    """Check, then queue (or print with --dry-run)."""
    site = HOME / "slurm" / "site.sh" if options.site is None else Path(options.site)
    if options.site is not None and not site.exists():
        raise ValueError(f"--site {options.site}: no such file; copy slurm/site.example.sh there")
    environment = read_site(site)
    scratch = environment.get("SWAX_SCRATCH", "")
    if not scratch:
        raise ValueError("SWAX_SCRATCH is not set: name a folder on every node's own disk, e.g. SWAX_SCRATCH=/tmp in slurm/site.sh")
    if not (HOME / options.script).is_file():
        raise ValueError(f"--script {options.script}: no such file in {HOME}")
    os.environ.update({key: value for key, value in environment.items() if key.startswith(("SBATCH_", "SWAX_", "SLURM_CONF"))})
    os.environ["SWAX_HOME"] = str(HOME)
    if site.exists():
        os.environ["SWAX_SITE"] = str(site.resolve())

    partition = choose_partition(options.partition or environment.get("SBATCH_PARTITION"), partitions())
    asked = options.gpus_per_node or environment.get("SBATCH_GPUS_PER_NODE")
    limit = options.time or environment.get("SBATCH_TIMELIMIT") or directive(HOME / options.script, "time")
    warning = lead(environment.get("SBATCH_SIGNAL") or directive(HOME / options.script, "signal"))
    gpus = check_allocation(partition, options.nodes, gpu_count(asked) if asked else None, limit, warning)
    queue = our_jobs()

    sweep: Sweep | None = None
    if options.sweep:
        sweep = read_sweep(options.sweep, options.overrides)
        base, points = sweep.base, sweep.points
    else:
        base, points = options.config, [options.overrides]
    for point in points:
        config = load_config(base, point)
        check_paths(config, base)
        processes = check_fit(config, options.nodes, gpus)
        check_run_dir(config, scratch, queue, options.after)
        if not options.dry_run:
            validate_run_dir(config)
    size = model_parallel_size(config)
    place = f"{options.nodes} node(s) of {partition.name} with {gpus or 'no'} GPU(s) each"
    print(f"{len(points)} run(s), {processes} process(es) on {place}: model parallel {size}, data {processes // size}", file=sys.stderr)

    run_dir = os.path.abspath(sweep.run_dir if sweep else absolute(config).run_dir)
    name, tail, array = Path(base).stem, ["--config", os.path.abspath(base), *options.overrides], None
    if sweep:
        most = f"%{sweep.concurrent}" if sweep.concurrent else ""
        array = f"0-{len(points) - 1}{most}"
        frozen = f"{run_dir}/sweep_STAMP.json" if options.dry_run else os.path.abspath(write_points(sweep, time.strftime("%Y%m%d_%H%M%S")))
        tail = ["--config", os.path.abspath(base), "--sweep", frozen]
    return _queue(options, run_dir, name, tail, array)


def _queue(options: argparse.Namespace, run_dir: str, name: str, tail: list[str], array: str | None) -> int:
    after = f"afterok:{options.after}" if options.after else None
    for _ in range(options.chain):
        command = command_line(options, run_dir, name, tail, after, array)
        if options.dry_run:
            print(shlex.join(command))
            job = "JOB"
        else:
            job = ask(*command).strip().split(";")[0]
            with open(f"{run_dir}/submitted.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "time": time.time(), "command": shlex.join(command)}) + "\n")
            print(job)
            print(f"queued as job {job}; follow it with: python -m launcher.submit --tail {job} --follow", file=sys.stderr)
        after = f"afterany:{job}"
    return 0


def progress(run_dir: Path) -> str:
    """How far a run is: the last logged step and its loss, and the newest complete checkpoint."""
    told = []
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
        if lines:
            last = json.loads(lines[-1])
            told.append(f"step {last['step'] + 1}, loss {last['loss/train']:.4f}")
    try:
        newest = latest(run_dir / "checkpoints")
    except ValueError as error:  # the newest is damaged, and a start would be refused
        told.append(str(error))
    else:
        told.append(f"newest checkpoint {newest.name}" if newest else "no checkpoint")
    return ", ".join(told)


def status(_: argparse.Namespace) -> int:
    """Jobs in the queue, one line each."""
    jobs = our_jobs()
    if not jobs:
        print("no job of launcher.submit is queued or running")
    for job in jobs:
        folder = Path(job.run_dir)
        restarts = re.search(r"\bRestarts=(\d+)", ask("scontrol", "-o", "show", "job", job.id))
        times = restarts.group(1) if restarts else "0"
        print(f"{job.id}  {job.state}  {job.nodes} node(s) {job.place}  {job.elapsed}  restarts {times}  {folder}")
        print(f"    {progress(folder)}")
    return 0


def tail(options: argparse.Namespace) -> int:
    """Shows the newest log of rank 0 of a job or a run directory (replaces this process by tail)."""
    folder = Path(options.tail)
    if not folder.is_dir():
        found = [job for job in our_jobs() if job.id == options.tail]
        if not found:
            raise ValueError(f"--tail {options.tail}: neither a run directory nor a job of yours in the queue")
        folder = Path(found[0].run_dir)
    logs = sorted([*folder.glob("logs/*/rank_0.log"), *folder.glob("slurm-*.out")], key=lambda path: path.stat().st_mtime)
    if not logs:
        raise ValueError(f"--tail {options.tail}: {folder} holds no log yet")
    print(f"==> {logs[-1]}", file=sys.stderr, flush=True)
    os.execvp("tail", ["tail", "-n", str(options.lines), *(["-F"] if options.follow else []), str(logs[-1])])


def cancel(options: argparse.Namespace) -> int:
    """Ends jobs of launcher.submit and no others; what runs saves first, as far as Slurm's KillWait lets it."""
    ours = {job.id for job in our_jobs()} | {job.id.partition("_")[0] for job in our_jobs()}
    for job in options.cancel:
        if job not in ours:
            raise ValueError(f"--cancel {job}: no job of launcher.submit with this number is queued or running")
    ask("scancel", *options.cancel)
    print(f"cancelled: {', '.join(options.cancel)}", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.submit", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value", help="overrides of single fields")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpus-per-node", metavar="N|KIND:N", help="(default: what the partition's nodes have)")
    parser.add_argument("--partition", help="(default: SBATCH_PARTITION of slurm/site.sh, or the cluster's)")
    parser.add_argument("--account", help="(default: SBATCH_ACCOUNT of slurm/site.sh)")
    parser.add_argument("--time", help="time limit, e.g. 12:00:00 (default: the script's)")
    parser.add_argument("--exclude", metavar="NODES", help="nodes that must not be used")
    parser.add_argument("--site", metavar="FILE", help="site settings (default: slurm/site.sh, where it exists)")
    parser.add_argument("--script", default="slurm/pretrain_7b.sh", help="batch script (default: %(default)s; --config makes them alike)")
    parser.add_argument("--sweep", metavar="FILE", help="a grid of runs as a job array")
    parser.add_argument("--after", metavar="JOB", help="start when this job has ended well (data preparation, an earlier run)")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="queue N jobs in a row, each going on with the same run")
    parser.add_argument("--dry-run", action="store_true", help="check, print the sbatch command, queue nothing")
    parser.add_argument("--status", action="store_true", help="what is queued and running, and how far it is")
    parser.add_argument("--tail", metavar="JOB|RUN_DIR", help="the newest log of rank 0")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="with --tail (default: 20)")
    parser.add_argument("--follow", action="store_true", help="with --tail: go on showing what is added")
    parser.add_argument("--cancel", nargs="+", metavar="JOB", help="end these jobs")
    options = parser.parse_intermixed_args(argv)
    if options.config is not None and "=" in options.config and options.sweep:
        options.config, options.overrides = None, [options.config, *options.overrides]
    try:
        if options.status:
            return status(options)
        if options.tail:
            return tail(options)
        if options.cancel:
            return cancel(options)
        if (options.config is None) == (options.sweep is None):
            raise ValueError("name a configuration, e.g. configs/demo.yaml, or a sweep with --sweep FILE (one of the two)")
        if options.chain < 1:
            raise ValueError(f"--chain {options.chain}: must be 1 or more")
        return submit(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
