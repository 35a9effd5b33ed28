"""What this cluster's Slurm says, and the site's settings: asked on the login node."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

COMMENT = "swax:"  # a job of ours has the comment swax:<run_dir>; a sweep whose points did not start yet, swax:<file of points>
_MISSING = "{0} is not on this machine: submit from a login node of the cluster (or start with python -m launcher.run here)"


@dataclass(frozen=True)
class Partition:
    """gpus: of the best-equipped node; seconds: longest job, None without a limit."""

    name: str
    default: bool
    nodes: int
    gpus: int
    seconds: int | None


@dataclass(frozen=True)
class Job:
    """One line of the queue that is ours. after: numbers of the jobs that it waits for."""

    id: str
    state: str
    nodes: int
    place: str
    elapsed: str
    run_dir: str
    after: frozenset[str] = frozenset()


def ask(*command: str) -> str:
    """The output of a Slurm command; ValueError with Slurm's own words where it fails."""
    if shutil.which(command[0]) is None:
        raise ValueError(_MISSING.format(command[0]))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {' '.join(done.stderr.split())[-300:] or done.returncode}")
    return done.stdout


def partitions() -> dict[str, Partition]:
    """The partitions that are up, by name."""
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "-h", "-o", "%P|%D|%G|%l|%a").splitlines():
        name, nodes, gres, limit, state = line.split("|")
        if state != "up":
            continue
        known = found.get(name.rstrip("*"))
        found[name.rstrip("*")] = Partition(
            name=name.rstrip("*"),
            default=name.endswith("*"),
            nodes=int(nodes) + (known.nodes if known else 0),
            gpus=max(gpus_of(gres), known.gpus if known else 0),
            seconds=duration(limit),
        )
    return found


def gpus_of(gres: str) -> int:
    """GPUs in a list of generic resources, e.g. ``gpu:h100:8(S:0-1),nvme:1``."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres))


def gpu_count(text: str) -> int:
    """GPUs of ``--gpus-per-node``: a number, or kinds with their numbers, e.g. ``h100:8``. Raises ValueError."""
    parts = [re.fullmatch(r"(?:[^:,]+:)?(\d+)", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"--gpus-per-node {text}: give a number, or a kind and a number like h100:8 (SBATCH_GPUS_PER_NODE, slurm/site.sh)")
    return sum(int(part.group(1)) for part in parts if part)


def directive(script: Path, option: str) -> str | None:
    """What a batch script's own ``#SBATCH --option=value`` says; None where it says nothing."""
    found = re.search(rf"^#SBATCH\s+--{option}[= ](\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def lead(signal: str | None) -> int:
    """Seconds before the time limit at which ``--signal=[B:]NAME[@SECONDS]`` comes (Slurm's default: 60); 0 without one."""
    return int(signal.partition("@")[2] or 60) if signal else 0


def duration(text: str) -> int | None:
    """Slurm's time (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in seconds; None for no limit. Raises ValueError."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"--time {text}: give minutes, HH:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    first, second, third = (int(part) if part else 0 for part in rest)
    if days is not None:
        hours, minutes, seconds = first, second, third
    elif rest[2] is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def our_jobs() -> list[Job]:
    """The user's training jobs in the queue, array points apart: of launcher.submit, and of plain sbatch once they started."""
    jobs = []
    for line in ask("squeue", "--me", "-h", "-r", "-o", "%i|%T|%D|%R|%M|%E|%k").splitlines():
        number, state, nodes, place, elapsed, after, comment = line.split("|", 6)
        if comment.startswith(COMMENT):
            waits = frozenset(re.findall(r"after\w*:(\d+)", after))
            jobs.append(Job(number, state, int(nodes), place, elapsed, run_dir_of(number, comment.removeprefix(COMMENT)), waits))
    return jobs


def run_dir_of(number: str, said: str) -> str:
    """The run directory of a job by its comment; of a point of a sweep that did not start yet, from the file of points."""
    index = number.partition("_")[2]
    if not said.endswith(".json") or not index.isdigit():
        return said
    try:
        chosen = json.loads(Path(said).read_text(encoding="utf-8"))[int(index)]
    except (OSError, ValueError, IndexError):
        return said
    return os.path.abspath(chosen[-1].removeprefix("run_dir="))


def read_site(path: Path) -> dict[str, str]:
    """The environment with the site's file sourced; what it sets wins. Raises ValueError where the file fails."""
    if not path.exists():
        return dict(os.environ)
    done = subprocess.run(["bash", "-c", 'set -e; . "$0" >/dev/null; env -0', str(path)], capture_output=True)
    if done.returncode:
        raise ValueError(f"{path} fails: {' '.join(done.stderr.decode(errors='replace').split())[-300:]}")
    return dict(item.split("=", 1) for item in done.stdout.decode(errors="replace").split("\0") if "=" in item)
