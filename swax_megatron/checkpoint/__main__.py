"""Look after checkpoints from the command line: list, verify, show, prune."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from swax_megatron.checkpoint.folder import STALE_SECONDS, is_complete, latest, list_checkpoints, prune
from swax_megatron.checkpoint.reader import Checkpoint, open_checkpoint

EPILOG = """examples:
  python -m swax_megatron.checkpoint list runs/default
  python -m swax_megatron.checkpoint verify runs/default/checkpoints/step_500
  python -m swax_megatron.checkpoint show runs/default --tensors
  python -m swax_megatron.checkpoint prune runs/default --keep-last 2

PATH is a run directory, its checkpoints folder or (verify, show) one step_N; verify and show take the newest of a folder.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (2 for an error of the user's or a damaged checkpoint)."""
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.checkpoint", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,verify,show,prune}")
    for name, text in (
        ("list", "the checkpoints of a folder"),
        ("verify", "compare every file with its sha256"),
        ("show", "step, state, sizes"),
        ("prune", "delete older checkpoints and what killed runs left"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar="PATH", type=Path)
        if name == "show":
            command.add_argument("--tensors", action="store_true", help="every tensor with its type, shape and number of chunks")
            command.add_argument("--config", action="store_true", help="the resolved configuration as JSON")
        if name == "prune":
            command.add_argument("--keep-last", type=int, required=True, help="complete checkpoints to keep; 0: all")
            hours = STALE_SECONDS / 3600
            command.add_argument(
                "--stale-hours", type=float, default=hours, help="age from which a temporary folder is stale (default: %(default)g)"
            )
    options = parser.parse_args(arguments)
    try:
        if not options.path.is_dir():
            raise ValueError(f"{options.path} is no folder: give a run directory or a checkpoint")
        {"list": _list, "verify": _verify, "show": _show, "prune": _prune}[options.command](options)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _root(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _one(path: Path) -> Checkpoint:
    if path.name.startswith("step_") or (path / "manifest.json").exists():
        return open_checkpoint(path)
    newest = latest(_root(path))
    if newest is None:
        raise ValueError(f"{_root(path)} holds no complete checkpoint: give a run directory or a step_N folder")
    return open_checkpoint(newest)


def _list(options: argparse.Namespace) -> None:
    root = _root(options.path)
    for path in list_checkpoints(root):
        try:
            checkpoint = open_checkpoint(path)
        except ValueError as error:
            print(f"{path.name}\tunreadable: {error}")
            continue
        size = sum(entry["bytes"] for entry in checkpoint.files.values()) / 2**30
        print(f"{path.name}\tcomplete\t{size:.3f} GiB\tsaved by {checkpoint.world_size} ranks")
    for path in sorted(root.iterdir()):
        if path.name.startswith("step_") and not is_complete(path):
            print(f"{path.name}\tincomplete")


def _verify(options: argparse.Namespace) -> None:
    checkpoint = _one(options.path)
    total = sum(entry["bytes"] for entry in checkpoint.files.values())
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

    foreign = checkpoint.verify(ranks_share=False, progress=progress)
    for name in foreign:
        print(f"warning: {checkpoint.path / name} does not belong to the checkpoint", file=sys.stderr)
    print(f"{checkpoint.path}: {len(checkpoint.files)} files, {total} bytes, all as they were saved")


def _show(options: argparse.Namespace) -> None:
    checkpoint = _one(options.path)
    if options.config:
        print(json.dumps(checkpoint.config, indent=2))
        return
    elements = sum(checkpoint.numel(key) for key in checkpoint.keys() if key.startswith("param."))
    print(f"{checkpoint.path}\nstep: {checkpoint.step}\nsaved by: {checkpoint.world_size} ranks, {len(checkpoint.files)} files")
    print(f"tensors: {len(checkpoint.keys())}, training parameters: {elements}\nstate: {json.dumps(checkpoint.state)}")
    for key in checkpoint.keys() if options.tensors else []:
        shape = "x".join(map(str, checkpoint.shape(key))) or "scalar"
        print(f"{key}\t{checkpoint.dtype(key)}\t{shape}\t{checkpoint.chunk_count(key)} chunks")


def _prune(options: argparse.Namespace) -> None:
    for path in prune(_root(options.path), options.keep_last, options.stale_hours * 3600):
        print(f"removed {path.name}")


if __name__ == "__main__":
    sys.exit(main())
