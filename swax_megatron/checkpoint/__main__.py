"""Look after checkpoints from the command line: list, verify, show, diff, copy, reshard, prune."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from swax_megatron.checkpoint.folder import STALE_SECONDS, damage, latest, list_checkpoints, prune
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.reader import Checkpoint, open_checkpoint
from swax_megatron.checkpoint.remote import Remote, is_remote
from swax_megatron.checkpoint.reshard import differences, reshard
from swax_megatron.errors import RunError

EPILOG = """examples:
  python -m swax_megatron.checkpoint list runs/default
  python -m swax_megatron.checkpoint verify s3://bucket/run/step_500
  python -m swax_megatron.checkpoint show runs/default --tensors
  python -m swax_megatron.checkpoint diff runs/a/checkpoints/step_500 runs/b/checkpoints/step_500
  python -m swax_megatron.checkpoint copy s3://bucket/run/step_500 runs/default
  python -m swax_megatron.checkpoint reshard runs/default small --files 4
  python -m swax_megatron.checkpoint prune runs/default --keep-last 2 --keep-every 10000

PATH is a run directory, its checkpoints folder or one step_N; a folder stands for its newest checkpoint. list, verify, show,
copy and prune also take a URL that fsspec reaches, of the folder or of one step_N in it.
"""
ONE_PROCESS = Ranks(0, 1)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (2 for an error of the user's or a damaged checkpoint; diff: 1 where there are differences)."""
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.checkpoint", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,verify,show,diff,copy,reshard,prune}")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str, *further: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for position in ("path", *further):
            command.add_argument(position, metavar=position.upper())
        return command

    add("list", _list, "the checkpoints of a folder")
    add("verify", _verify, "compare every file with its sha256")
    show = add("show", _show, "step, state, sizes")
    show.add_argument("--tensors", action="store_true", help="every tensor with its type, shape and number of chunks")
    show.add_argument("--config", action="store_true", help="the resolved configuration as JSON")
    add("diff", _diff, "what two checkpoints do not share; exit code 1 where there is anything", "other")
    add("copy", _copy, "upload one checkpoint to a URL, or download it into a run directory; verified", "target")
    again = add("reshard", _reshard, "write a checkpoint again in another number of files", "target")
    again.add_argument("--files", type=int, required=True, help="number of files; one is held in memory at a time")
    old = add("prune", _prune, "delete older checkpoints and what killed runs left")
    old.add_argument("--keep-last", type=int, required=True, help="complete checkpoints to keep; 0: all")
    old.add_argument("--keep-every", type=int, default=0, help="keep those of every N-th step as well; 0: none")
    hours = STALE_SECONDS / 3600
    old.add_argument("--stale-hours", type=float, default=hours, help="age from which a temporary folder is stale (default: %(default)g)")
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _root(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give a run directory or a checkpoint")
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _one(text: str) -> Checkpoint:
    if is_remote(text):
        raise ValueError(f"{text}: bring it here first, with copy {text} RUN_DIR")
    path, root = Path(text), _root(text)
    if path.name.startswith("step_") or (path / "manifest.json").exists():
        return open_checkpoint(path)
    newest = latest(root)
    if newest is None:
        raise ValueError(f"{root} holds no complete checkpoint: give a run directory or a step_N folder")
    return open_checkpoint(newest)


def _far(url: str) -> tuple[Remote, int]:
    """The place and the step that a URL names; the newest step where it names none."""
    match = re.fullmatch(r"(.*)/step_(\d+)/?", url)
    if match:
        return Remote(match[1]), int(match[2])
    remote = Remote(url)
    step = remote.newest()
    if step < 0:
        raise ValueError(f"{url} holds no complete checkpoint")
    return remote, step


def _line(name: str, checkpoint: Checkpoint) -> str:
    size = sum(entry["bytes"] for entry in checkpoint.files.values()) / 2**30
    return f"{name}\tcomplete\t{size:.3f} GiB\tsaved by {checkpoint.world_size} ranks"


def _list(options: argparse.Namespace) -> None:
    if is_remote(options.path):
        remote = Remote(options.path)
        for step in remote.folders():
            try:
                print(_line(f"step_{step}", remote.open(step)))
            except ValueError as error:
                print(f"step_{step}\tunreadable: {error}")
        return
    root = _root(options.path)
    for path in list_checkpoints(root):
        try:
            print(_line(path.name, open_checkpoint(path)))
        except ValueError as error:
            print(f"{path.name}\tunreadable: {error}")
    for path in sorted(root.iterdir()):
        problem = damage(path) if path.name.startswith("step_") else None
        if problem is not None:
            damaged = path.name.removeprefix("step_").isdigit()  # a folder gets such a name once it is complete
            print(f"{path.name}\tdamaged: {problem}" if damaged else f"{path.name}\tincomplete")


def _progress(total: int) -> Callable[[int], None]:
    """Tells of the bytes done every five seconds, on stderr."""
    start = shown = time.monotonic()
    done = 0

    def progress(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown > 5.0:
            shown = now
            rate = done / (now - start)
            left = (total - done) / rate
            print(f"{done / 2**30:.1f}/{total / 2**30:.1f} GiB, {rate / 2**20:.0f} MiB/s, {left:.0f} s left", file=sys.stderr)

    return progress


def _verify(options: argparse.Namespace) -> None:
    if is_remote(options.path):
        remote, step = _far(options.path)
        files = remote.open(step).files
        total = remote.verify(step, _progress(sum(entry["bytes"] for entry in files.values())))
        print(f"{remote}/step_{step}: {len(files)} files, {total} bytes, all as they were saved")
        return
    checkpoint = _one(options.path)
    total = sum(entry["bytes"] for entry in checkpoint.files.values())
    foreign = checkpoint.verify(ranks_share=False, progress=_progress(total))
    for name in foreign:
        print(f"warning: {checkpoint.path / name} does not belong to the checkpoint", file=sys.stderr)
    print(f"{checkpoint.path}: {len(checkpoint.files)} files, {total} bytes, all as they were saved")


def _show(options: argparse.Namespace) -> None:
    if is_remote(options.path):
        remote, step = _far(options.path)
        checkpoint, where = remote.open(step), f"{remote}/step_{step}"
    else:
        checkpoint = _one(options.path)
        where = str(checkpoint.path)
    if options.config:
        print(json.dumps(checkpoint.config, indent=2))
        return
    elements = sum(checkpoint.numel(key) for key in checkpoint.keys() if key.startswith("param."))
    print(f"{where}\nstep: {checkpoint.step}\nsaved by: {checkpoint.world_size} ranks, {len(checkpoint.files)} files")
    print(f"tensors: {len(checkpoint.keys())}, training parameters: {elements}\nstate: {json.dumps(checkpoint.state)}")
    for key in checkpoint.keys() if options.tensors else []:
        shape = "x".join(map(str, checkpoint.shape(key))) or "scalar"
        print(f"{key}\t{checkpoint.dtype(key)}\t{shape}\t{checkpoint.chunk_count(key)} chunks")


def _diff(options: argparse.Namespace) -> int:
    found = 0
    for line in differences(_one(options.path), _one(options.other)):
        found += 1
        print(line)
    return 1 if found else 0


def _copy(options: argparse.Namespace) -> None:
    if is_remote(options.path) == is_remote(options.target):
        raise ValueError("copy goes between a folder and a URL: give one of each")
    if is_remote(options.target):
        checkpoint = _one(options.path)
        Remote(options.target).upload(checkpoint.path, ONE_PROCESS)
        print(f"{checkpoint.path} -> {options.target.rstrip('/')}/step_{checkpoint.step}")
        return
    remote, step = _far(options.path)
    path = remote.download(step, Path(options.target) / "checkpoints", ONE_PROCESS)
    print(f"{remote}/step_{step} -> {path}")


def _reshard(options: argparse.Namespace) -> None:
    checkpoint = _one(options.path)
    if Path(options.target).resolve() == checkpoint.path.parent.resolve():
        raise ValueError(f"{options.target} is the folder of {checkpoint.path} itself: give another one")
    print(reshard(checkpoint, Path(options.target), options.files))


def _prune(options: argparse.Namespace) -> None:
    if is_remote(options.path):
        for step in Remote(options.path).prune(options.keep_last, options.keep_every):
            print(f"removed step_{step}")
        return
    for path in prune(_root(options.path), options.keep_last, options.keep_every, options.stale_hours * 3600):
        print(f"removed {path.name}")


if __name__ == "__main__":
    sys.exit(main())
