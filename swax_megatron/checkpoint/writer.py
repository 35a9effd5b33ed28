"""Save: every rank writes its own fragments, rank 0 checks that they tile every tensor and publishes the folder.

Three meetings of the ranks, over a process group or, in the background, over files: rank 0 names the temporary folder;
the chunk tables (or an error) go to rank 0; rank 0 tells the outcome. A rank that fails reports instead of leaving, so
that all raise and none waits.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swax_megatron.checkpoint.boxes import Box, tiling_error
from swax_megatron.checkpoint.deferred import Deferred
from swax_megatron.checkpoint.folder import COMPLETE, MANIFEST, fsync_folder, publish, write_file
from swax_megatron.checkpoint.mail import Mail
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.tensorfile import dtype_name, sha256_on_disk, write_tensors
from swax_megatron.errors import RunError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Fragment:
    """A block of a global tensor: ``tensor`` holds the elements from ``offsets`` on of the tensor ``key``.

    Raises ValueError where the block does not lie inside ``global_shape``.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor | Deferred

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_shape", tuple(int(n) for n in self.global_shape))
        object.__setattr__(self, "offsets", tuple(int(n) for n in self.offsets))
        shape, sizes = self.global_shape, tuple(self.tensor.shape)
        inside = len(shape) == len(self.offsets) == len(sizes) and all(
            0 <= start and start + size <= whole for start, size, whole in zip(self.offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"fragment of {self.key}: offsets {self.offsets} and sizes {sizes} are no block of shape {shape}")

    @property
    def box(self) -> Box:
        """Where the fragment lies in the global tensor."""
        return Box(self.offsets, tuple(self.tensor.shape))


def stored_name(key: str, offsets: Iterable[int]) -> str:
    """Name of a chunk inside its file."""
    return f"{key}@{','.join(map(str, offsets))}"


def save(
    root: str | Path,
    step: int,
    fragments: Iterable[Fragment],
    *,
    config: dict[str, Any],
    state: dict[str, Any],
    rank_state: dict[str, Tensor] | None = None,
    group: Any = None,
) -> Path:
    """Write ``root/step_N`` and return its path. Collective: every rank of ``group`` calls it with its own fragments.

    Args:
        root: folder of the checkpoints, on a file system that all ranks share.
        step: N, the updates done.
        fragments: this rank's blocks; over all ranks each element of each tensor exactly once. Any device.
        config, state: JSON values (tuples come back as lists); rank 0's are stored.
        rank_state: tensors that belong to this rank alone (e.g. generator states), read back by rank.
        group: process group (a gloo one keeps the exchange off the GPU); None: the default group, or this process alone.

    Raises (on every rank, and nothing is left under ``step_N``): ValueError for fragments that leave a hole, overlap or disagree,
    and for config or state that is no JSON; RunError, naming the rank, for anything else that fails (a full disk).
    A complete ``step_N`` is replaced; an incomplete or foreign one is moved aside.
    """
    return save_among(Ranks.of(group), root, step, fragments, config=config, state=state, rank_state=rank_state)


def save_among(
    ranks: Ranks | Mail,
    root: str | Path,
    step: int,
    fragments: Iterable[Fragment],
    *,
    config: dict[str, Any],
    state: dict[str, Any],
    rank_state: dict[str, Tensor] | None = None,
    read_back: bool = False,
) -> Path:
    """``save`` among ranks that meet in any way. ``read_back``: hash every file again as the disk holds it."""
    root = Path(root)
    error: Exception | None = None
    opening: dict[str, Any] = {}
    if ranks.rank == 0:
        try:
            opening["folder"] = open_folder(root, step, config, state)
        except Exception as caught:  # reported to all ranks
            error, opening["failure"] = caught, _describe(0, caught)
    opening = ranks.broadcast(opening)
    _raise(opening.get("failure"), step, error)
    temporary = root / opening["folder"]

    try:
        report = write_rank(temporary, ranks.rank, list(fragments), rank_state)
        if read_back:
            _compare_with_disk(temporary, report["files"])
    except Exception as caught:  # reported to all ranks
        error, report = caught, {"failure": _describe(ranks.rank, caught)}
    reports = ranks.gather(report)

    failure: dict[str, str] | None = None
    if reports is not None:
        try:
            failure = next((r["failure"] for r in reports if "failure" in r), None)
            if failure is None:
                finish(root, step, temporary, reports, config, state)
        except Exception as caught:  # reported to all ranks
            error, failure = caught, _describe(0, caught)
    failure = ranks.broadcast(failure)
    if failure is not None:
        shutil.rmtree(temporary, ignore_errors=True)  # all ranks: without a shared file system each has its own
    _raise(failure, step, error)
    return root / f"step_{step}"


def open_folder(root: Path, step: int, config: dict[str, Any], state: dict[str, Any]) -> str:
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r}: the number of updates done, 0 or more")
    for name, value in (("config", config), ("state", state)):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's {name} is no JSON: {error}") from error
    name = f"step_{step}.tmp-{secrets.token_hex(6)}"
    (root / name).mkdir(parents=True)
    return name


def write_rank(folder: Path, rank: int, fragments: list[Fragment], rank_state: dict[str, Tensor] | None) -> dict[str, Any]:
    """Write this rank's files; returns {"chunks": [(key, shape, dtype, file, offsets, sizes)], "files": {...}, "state": name or None}."""
    file = f"rank_{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    chunks: list[tuple[Any, ...]] = []
    for fragment in fragments:
        box = fragment.box
        chunks.append((fragment.key, fragment.global_shape, dtype_name(fragment.tensor.dtype), file, box.offsets, box.sizes))
        if box.volume == 0:
            continue  # the key is still announced
        name = stored_name(fragment.key, box.offsets)
        if name in tensors:
            raise ValueError(f"{fragment.key}: rank {rank} gave two fragments at offsets {box.offsets}: save each element once")
        tensors[name] = fragment.tensor
    folder.mkdir(exist_ok=True)  # where the folder is not shared, rank 0 will miss the file and say so
    files = {file: write_tensors(folder / file, tensors)} if tensors else {}
    state_file = None
    if rank_state is not None:
        state_file = f"rank_{rank:05d}_state.safetensors"
        files[state_file] = write_tensors(folder / state_file, rank_state)
    return {"chunks": chunks, "files": files, "state": state_file}


def _compare_with_disk(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        if sha256_on_disk(folder / name) != entry["sha256"]:
            raise RunError(f"{folder / name} does not read back as it was written: check the disk")


def finish(
    root: Path, step: int, temporary: Path, reports: list[dict[str, Any]], config: dict[str, Any], state: dict[str, Any]
) -> None:
    """Rank 0: check, write manifest.json and COMPLETE, rename."""
    files = {name: entry for report in reports for name, entry in report["files"].items()}
    for name, entry in files.items():
        try:
            size = (temporary / name).stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"rank 0 does not see {temporary / name}: run_dir must lie on a file system that all nodes share") from error
        if size != entry["bytes"]:
            raise ValueError(f"{temporary / name} has {size} bytes, {entry['bytes']} were written: check the file system")
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": len(reports),
        "config": config,
        "state": state,
        "tensors": _tensors(reports),
        "rank_states": {str(rank): report["state"] for rank, report in enumerate(reports) if report["state"]},
        "files": files,
    }
    text = json.dumps(manifest).encode()
    write_file(temporary / MANIFEST, text)
    fsync_folder(temporary)
    write_file(temporary / COMPLETE, hashlib.sha256(text).hexdigest().encode() + b"\n")
    fsync_folder(temporary)
    publish(temporary, root / f"step_{step}")


def _tensors(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's chunk table; ValueError where ranks disagree or a tensor is not tiled exactly."""
    tensors: dict[str, dict[str, Any]] = {}
    for rank, report in enumerate(reports):
        for key, shape, dtype, file, offsets, sizes in report["chunks"]:
            entry = tensors.setdefault(key, {"shape": list(shape), "dtype": dtype, "chunks": []})
            if entry["shape"] != list(shape) or entry["dtype"] != dtype:
                raise ValueError(f"{key}: rank {rank} saves {dtype} {list(shape)}, an earlier rank {entry['dtype']} {entry['shape']}")
            if 0 not in sizes:
                entry["chunks"].append({"file": file, "offsets": list(offsets), "sizes": list(sizes)})
    problems = []
    for key, entry in tensors.items():
        boxes = [Box(tuple(chunk["offsets"]), tuple(chunk["sizes"])) for chunk in entry["chunks"]]
        problem = tiling_error(entry["shape"], boxes)
        if problem is not None:
            problems.append(f"{key}: {problem}")
    if problems:
        more = f" (and {len(problems) - 5} more tensors)" if len(problems) > 5 else ""
        raise ValueError("the ranks' fragments do not make whole tensors: " + "; ".join(problems[:5]) + more)
    return tensors


def _describe(rank: int, error: Exception) -> dict[str, str]:
    kind = "value" if isinstance(error, ValueError) else "other"
    text = str(error) if kind == "value" else f"{type(error).__name__}: {error}"
    return {"kind": kind, "text": f"rank {rank}: {text}"}


def _raise(failure: dict[str, str] | None, step: int, cause: Exception | None) -> None:
    if failure is None:
        return
    text = f"checkpoint step_{step} was not saved: {failure['text']}"
    raise (ValueError(text) if failure["kind"] == "value" else RunError(text)) from cause
