"""The folder of checkpoints: names, the COMPLETE marker, what is newest, what may go.

``root/step_N`` is a checkpoint; it counts as complete where COMPLETE holds the sha256 of manifest.json. It gets that name by a
rename once it is complete, so where it is not, it was damaged, and whoever wants the newest is told. Beside them:
``step_N.tmp-*`` (being written, or left by a killed run), ``step_N.replaced-*`` (an older checkpoint of the same step,
between the two renames that replace it), ``step_N.aside-*`` (not ours or incomplete: kept for the user),
``*.deleting-*`` (on its way out).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import torch.distributed as dist

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
STALE_SECONDS = 3600.0

_CHECKPOINT = re.compile(r"step_(\d+)(\.replaced-[0-9a-f]+)?")
_TEMPORARY = re.compile(r"step_\d+\.tmp-[0-9a-f]+")
_DELETING = re.compile(r"step_\d+(\.\w+-[0-9a-f]+)?\.deleting-[0-9a-f]+")
_log = logging.getLogger(__name__)


def read_manifest(path: Path) -> bytes:
    """The text of manifest.json where COMPLETE holds its hash. Cheap: no data is read. ValueError that says what is wrong elsewhere."""
    try:
        text = (path / MANIFEST).read_bytes()
        marker = (path / COMPLETE).read_bytes().strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name
        raise ValueError(f"{path} is no complete checkpoint ({missing} is missing): move it away to use an older one") from error
    if marker != hashlib.sha256(text).hexdigest().encode():
        raise ValueError(f"{path / MANIFEST} is not what was saved (its hash is not the one in COMPLETE): move it away to use an older one")
    return text


def damage(path: Path) -> str | None:
    """What keeps a folder from being a complete checkpoint, or None."""
    try:
        read_manifest(path)
    except ValueError as error:
        return str(error)
    return None


def is_complete(path: Path) -> bool:
    """Whether COMPLETE is there and holds the manifest's hash."""
    return damage(path) is None


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of what bears a checkpoint's name, oldest first; a plain name stands for its ``replaced`` forerunner."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir(), reverse=True) if root.is_dir() else []:
        match = _CHECKPOINT.fullmatch(path.name)
        if match and (match[2] is None or not is_complete(root / f"step_{int(match[1])}")):
            found[int(match[1])] = path
    return sorted(found.items())


def list_checkpoints(root: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; empty where there is none or no folder."""
    return [path for _, path in step_folders(Path(root)) if is_complete(path)]


def latest(root: str | Path) -> Path | None:
    """The newest checkpoint, complete by marker and manifest hash; None where there is none at all.

    Raises ValueError, naming folder and cause, where the newest is damaged: an older one, or none, in its place would be a silent loss.
    """
    for _, path in reversed(step_folders(Path(root))):
        problem = damage(path)
        if problem is None:
            return path
        if path.exists():  # else the run that is training there has just pruned it
            raise ValueError(problem)
    return None


def newest_step(root: str | Path) -> int:
    """The step of the newest complete checkpoint, -1 where there is none: how far a run got. Damaged ones do not count."""
    return next((step for step, path in reversed(step_folders(Path(root))) if is_complete(path)), -1)


def doomed_steps(steps: list[int], keep_last: int, keep_every: int = 0) -> list[int]:
    """Of ascending steps those that retention gives up: not among the newest ``keep_last`` (0: keep all), no multiple of ``keep_every``.

    Raises ValueError for negative numbers.
    """
    if keep_last < 0:
        raise ValueError(f"checkpoint.keep_last={keep_last}: give the number of checkpoints to keep, or 0 to keep all")
    if keep_every < 0:
        raise ValueError(f"checkpoint.keep_every={keep_every}: give the distance of the steps to keep for ever, or 0 for none")
    older = steps[:-keep_last] if keep_last else []
    return [step for step in older if not keep_every or step % keep_every]


def prune(root: str | Path, keep_last: int, keep_every: int = 0, stale_seconds: float = STALE_SECONDS) -> list[Path]:
    """Delete all but the newest ``keep_last`` complete checkpoints (0: keep all) and those of every ``keep_every``-th step (0: none),
    and what killed runs left behind.

    A temporary folder is stale when nothing in it changed for ``stale_seconds``; incomplete, foreign and ``aside`` folders are
    never touched. Acts on rank 0 alone. Each folder is renamed first, so that no half-deleted one can be taken for whole.
    Returns what was removed. Raises ValueError for negative numbers.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return []
    root = Path(root)
    complete = {step: path for step, path in step_folders(root) if is_complete(path)}
    doomed = [complete[step] for step in doomed_steps(list(complete), keep_last, keep_every)]
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _CHECKPOINT.fullmatch(path.name)
        stale = _TEMPORARY.fullmatch(path.name) and time.time() - _last_change(path) > stale_seconds
        superseded = match and match[2] is not None and is_complete(root / f"step_{int(match[1])}")
        if stale or superseded or _DELETING.fullmatch(path.name):
            doomed.append(path)
    for path in doomed:
        remove(path)
    return doomed


def discard_after(root: str | Path, step: int) -> list[Path]:
    """Delete the complete checkpoints of later steps than ``step``, newest first (after a rewind a restart must not resume them).

    Acts on rank 0 alone; returns what was removed.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return []
    doomed = [path for number, path in reversed(step_folders(Path(root))) if number > step and is_complete(path)]
    for path in doomed:
        remove(path)
    return doomed


def remove(path: Path) -> None:
    """Rename aside, then delete."""
    if not _DELETING.fullmatch(path.name):
        path = path.rename(path.with_name(f"{path.name}.deleting-{secrets.token_hex(4)}"))
        fsync_folder(path.parent)
    shutil.rmtree(path)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; a complete checkpoint of that name is replaced, anything else is moved aside.

    Killed between the two renames, the replaced checkpoint still counts (``latest`` reads its name).
    """
    moved: Path | None = None
    replaced = is_complete(final)
    if os.path.lexists(final):
        moved = final.with_name(f"{final.name}.{'replaced' if replaced else 'aside'}-{secrets.token_hex(4)}")
        final.rename(moved)
        if not replaced:
            _log.warning("%s was no complete checkpoint; it is now %s", final, moved.name)
    try:
        temporary.rename(final)
    except OSError:
        if moved is not None:
            moved.rename(final)
        raise
    fsync_folder(final.parent)
    if replaced and moved is not None:
        try:
            remove(moved)
        except OSError as error:  # the new checkpoint stands; prune() tries again
            _log.warning("could not delete %s: %s", moved, error)


def write_file(path: Path, content: bytes) -> None:
    """Write a new small file and fsync it."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_change(path: Path) -> float:
    """Newest modification time of a folder and the files in it, seconds since the epoch; now for what vanishes meanwhile."""
    try:
        return max(entry.stat().st_mtime for entry in [path, *path.iterdir()])
    except FileNotFoundError:
        return time.time()
