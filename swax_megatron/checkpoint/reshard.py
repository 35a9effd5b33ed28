"""Two tools for whole checkpoints: write one again in another number of files, and say how two differ."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from swax_megatron.checkpoint.reader import Checkpoint
from swax_megatron.checkpoint.writer import Fragment, finish, open_folder, write_rank


def reshard(checkpoint: Checkpoint, root: Path, files: int) -> Path:
    """Write ``root/step_N`` with the same tensors, cut by rows into ``files`` files of nearly equal size; returns its path.

    A run needs this for nothing (it reads any layout): it is for moving fewer, or smaller, files. Holds one file in memory at a time.
    What belongs to single ranks (generator states) is kept for ranks below ``files``. Raises ValueError for ``files`` < 1 and damage.
    """
    if files < 1:
        raise ValueError(f"--files {files}: give the number of files to write, 1 or more")
    checkpoint.verify(ranks_share=False)
    temporary = root / open_folder(root, checkpoint.step, checkpoint.config, checkpoint.state)
    try:
        reports = []
        for file in range(files):
            fragments = [_read(checkpoint, key, start, stop) for key, start, stop in _rows(checkpoint, files, file)]
            reports.append(write_rank(temporary, file, fragments, checkpoint.rank_state(file)))
        finish(root, checkpoint.step, temporary, reports, checkpoint.config, checkpoint.state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return root / f"step_{checkpoint.step}"


def _rows(checkpoint: Checkpoint, files: int, file: int) -> Iterator[tuple[str, int, int]]:
    """(key, first row, row past the last) of what a file holds; a tensor with fewer rows than files lies whole in one of them."""
    for index, key in enumerate(checkpoint.keys()):
        rows = checkpoint.shape(key)[0] if checkpoint.shape(key) else 0
        if rows >= files:
            yield key, file * rows // files, (file + 1) * rows // files
        elif index % files == file:
            yield key, 0, rows


def _read(checkpoint: Checkpoint, key: str, start: int, stop: int) -> Fragment:
    shape = checkpoint.shape(key)
    size = (stop - start, *shape[1:]) if shape else ()
    fragment = Fragment(key, shape, (start, *(0 for _ in shape[1:])) if shape else (), torch.empty(size, dtype=checkpoint.dtype(key)))
    checkpoint.read_into([fragment])
    return fragment


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """One line for everything in which two checkpoints differ; nothing where they hold the same run. One tensor in memory at a time."""
    if a.step != b.step:
        yield f"step: {a.step} | {b.step}"
    for name, one, other in (("config", a.config, b.config), ("state", a.state, b.state)):
        before, after = _flat(one), _flat(other)
        for field in sorted(before.keys() | after.keys()):
            if before.get(field) != after.get(field):
                yield f"{name}.{field}: {before.get(field)!r} | {after.get(field)!r}"
    keys = a.keys() + [key for key in b.keys() if key not in set(a.keys())]
    for key in keys:
        missing = [path for path, known in ((a.path, a.keys()), (b.path, b.keys())) if key not in known]
        if missing:
            yield f"{key}: not in {missing[0]}"
        elif (a.shape(key), a.dtype(key)) != (b.shape(key), b.dtype(key)):
            yield f"{key}: {a.dtype(key)} {a.shape(key)} | {b.dtype(key)} {b.shape(key)}"
        else:
            one, other = a.read_tensor(key), b.read_tensor(key)
            if not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
                gap = (one.double() - other.double()).abs()
                yield f"{key}: {int((gap != 0).sum())} of {gap.numel()} elements differ, by {gap.max().item():.3g} at most"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {path: value for key, child in node.items() for path, value in _flat(child, f"{prefix}{key}.").items()}
