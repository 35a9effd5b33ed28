"""Open and read a checkpoint at any layout: each fragment is filled from the stored chunks it overlaps, nothing else is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swax_megatron.checkpoint.boxes import Box, intersect, tiling_error
from swax_megatron.checkpoint.folder import COMPLETE, MANIFEST, read_manifest
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.tensorfile import DTYPES, open_tensors, sha256_of
from swax_megatron.checkpoint.writer import FORMAT_VERSION, Fragment, stored_name

# A manifest is input: its file names must not lead out of the folder.
_FILE_NAME = re.compile(r"rank_\d{5,}(_state)?\.safetensors")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a complete checkpoint folder; reads the manifest alone.

    Raises ValueError where COMPLETE is missing or does not match the manifest, or where its format is newer.
    """
    path = Path(path)
    return from_manifest(path, read_manifest(path))


def from_manifest(path: Path, text: bytes) -> Checkpoint:
    """The checkpoint that a manifest describes. ValueError for a newer format, a wrong manifest and chunks that do not tile."""
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last one: nested thousands deep
        raise ValueError(f"{path / MANIFEST} is no checkpoint manifest: {error!r}") from error
    _expect(path, "format_version", version, _natural(version), "a number, 0 or more")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}, newer than this program's {FORMAT_VERSION}: update swax_megatron")
    try:
        return Checkpoint(path, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} lacks a field or holds a wrong type: {error!r}") from error


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expect(path: Path, field: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        shown = repr(value)
        raise ValueError(f"{path / MANIFEST}: {field} is {shown if len(shown) < 60 else shown[:60] + '...'}, expected {wanted}")


class Checkpoint:
    """An opened checkpoint. ``path``; ``step``: updates done; ``config``, ``state``: as saved; ``world_size``: ranks that saved."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        for field, kind, wanted in (
            ("step", int, "a number, 0 or more"),
            ("world_size", int, "a number, 0 or more"),
            *((name, dict, "a JSON object") for name in ("config", "state", "files", "rank_states", "tensors")),
        ):
            value = manifest[field]
            _expect(path, field, value, _natural(value) if kind is int else isinstance(value, kind), wanted)
        for name, entry in manifest["files"].items():
            _expect(path, f"the size of {name}", entry["bytes"], _natural(entry["bytes"]), "a number of bytes")
            _expect(path, f"the sha256 of {name}", entry["sha256"], isinstance(entry["sha256"], str), "a string")
        self.step: int = manifest["step"]
        self.world_size: int = manifest["world_size"]
        self.config: dict[str, Any] = manifest["config"]
        self.state: dict[str, Any] = manifest["state"]
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self._rank_states: dict[str, str] = manifest["rank_states"]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[tuple[str, Box]]] = {}
        for key, entry in manifest["tensors"].items():
            for numbers in (entry["shape"], *(chunk[part] for chunk in entry["chunks"] for part in ("offsets", "sizes"))):
                good = isinstance(numbers, list) and all(map(_natural, numbers))
                _expect(path, f"a shape, offset or size of {key}", numbers, good, "a list of numbers, 0 or more")
            self._shapes[key] = tuple(entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path / MANIFEST}: {key} has the unknown dtype {entry['dtype']!r}")
            self._dtypes[key] = DTYPES[entry["dtype"]]
            self._chunks[key] = [(c["file"], Box(tuple(c["offsets"]), tuple(c["sizes"]))) for c in entry["chunks"]]
            problem = tiling_error(self._shapes[key], [box for _, box in self._chunks[key]])
            if problem is not None:
                raise ValueError(f"{path / MANIFEST}: {key}: {problem}")
        named = {file for chunks in self._chunks.values() for file, _ in chunks} | set(self._rank_states.values())
        for file in named | set(self.files):
            if not _FILE_NAME.fullmatch(file) or file not in self.files:
                raise ValueError(f"{path / MANIFEST} names the file {file!r}, which no checkpoint of ours holds")

    def keys(self) -> list[str]:
        """Names of the stored tensors."""
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor; ValueError for an unknown key."""
        self._require(key)
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of a tensor; ValueError for an unknown key."""
        self._require(key)
        return self._dtypes[key]

    def numel(self, key: str) -> int:
        """Number of elements of a tensor; ValueError for an unknown key."""
        return prod(self.shape(key))

    def chunk_count(self, key: str) -> int:
        """Number of chunks a tensor is stored in; ValueError for an unknown key."""
        self._require(key)
        return len(self._chunks[key])

    def read_tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor on the CPU, in its stored type or converted to ``dtype``."""
        tensor = torch.empty(self.shape(key), dtype=dtype or self.dtype(key))
        self.read_into([Fragment(key, self.shape(key), (0,) * tensor.dim(), tensor)], convert=dtype is not None)
        return tensor

    def read_into(self, fragments: Iterable[Fragment], *, convert: bool = False) -> None:
        """Fill each fragment's tensor in place (any device, any strides) from the chunks that overlap it. Not collective.

        Raises ValueError, before any tensor is touched, that lists every missing key, other global shape and, unless
        ``convert``, other dtype, and the files that are missing or have another size.
        """
        fragments = list(fragments)
        self._refuse_differences(fragments, convert)
        plan: dict[str, list[tuple[Fragment, Box, Box]]] = {}  # file -> (fragment, stored chunk, their overlap)
        for fragment in fragments:
            for file, chunk in self._chunks[fragment.key]:
                common = intersect(fragment.box, chunk)
                if common is not None:
                    plan.setdefault(file, []).append((fragment, chunk, common))
        problems = [problem for file in sorted(plan) if (problem := self._size_problem(file)) is not None]
        if problems:
            raise ValueError(f"checkpoint {self.path} is damaged: {'; '.join(problems)}: move it away to use an older one")
        with torch.no_grad():
            for file in sorted(plan):
                with open_tensors(self.path / file) as handle:
                    for fragment, chunk, common in plan[file]:
                        piece = self._read_piece(handle, file, fragment.key, chunk, common)
                        fragment.tensor[common.slices(fragment.offsets)].copy_(piece)

    def rank_state(self, rank: int) -> dict[str, Tensor] | None:
        """The tensors that this rank stored for itself, or None where it stored none."""
        file = self._rank_states.get(str(rank))
        if file is None:
            return None
        with open_tensors(self.path / file) as handle:
            return {name: handle.get_tensor(name).clone() for name in handle.keys()}

    def verify(self, ranks_share: bool = True, *, group: Any = None, progress: Callable[[int], None] | None = None) -> list[str]:
        """Compare every file with the manifest's size and sha256; returns the names of files that the manifest does not know.

        With ``ranks_share`` this is collective over ``group`` (None: the default group, where there is one): each rank hashes a share of
        the files and all learn the result. ``progress`` is told the bytes of every block this rank hashed.
        Raises ValueError naming every missing or damaged file, on all ranks.
        """
        ranks = Ranks.of(group) if ranks_share else Ranks(0, 1)
        # Largest first, round robin: close to an even share.
        order = sorted(self.files, key=lambda name: (-self.files[name]["bytes"], name))
        problems: list[str] = []
        for name in order[ranks.rank :: ranks.size]:
            try:
                problem = self._size_problem(name)
                if problem is None and sha256_of(self.path / name, progress) != self.files[name]["sha256"]:
                    problem = f"{name} has another sha256 than when it was saved"
            except OSError as error:  # reported to all ranks
                problem = f"{name} cannot be read ({error.strerror or error})"
            if problem is not None:
                problems.append(problem)
        problems = sorted(problem for share in ranks.all_gather(problems) for problem in share)
        if problems:
            raise ValueError(f"checkpoint {self.path} is damaged: {'; '.join(problems)}: move it away to use an older one")
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in {MANIFEST, COMPLETE, *self.files})

    def _require(self, key: str) -> None:
        if key not in self._shapes:
            raise ValueError(f"checkpoint {self.path} holds no tensor {key!r}")

    def _size_problem(self, file: str) -> str | None:
        try:
            size = (self.path / file).stat().st_size
        except FileNotFoundError:
            return f"{file} is missing"
        expected = self.files[file]["bytes"]
        return None if size == expected else f"{file} has {size} bytes, not {expected}"

    def _refuse_differences(self, fragments: list[Fragment], convert: bool) -> None:
        problems: dict[str, None] = {}  # an ordered set: a key may come in several fragments
        for fragment in fragments:
            key = fragment.key
            if key not in self._shapes:
                problems[f"{key} is not stored"] = None
            elif self._shapes[key] != fragment.global_shape:
                problems[f"{key} is stored as {self._shapes[key]}, wanted {fragment.global_shape}"] = None
            elif not convert and self._dtypes[key] != fragment.tensor.dtype:
                problems[f"{key} is stored as {self._dtypes[key]}, wanted {fragment.tensor.dtype}"] = None
        if problems:
            raise ValueError(f"checkpoint {self.path} does not fit: {'; '.join(problems)}")

    def _read_piece(self, handle: Any, file: str, key: str, chunk: Box, common: Box) -> Tensor:
        stored = handle.get_slice(stored_name(key, chunk.offsets))
        if tuple(stored.get_shape()) != chunk.sizes or DTYPES.get(stored.get_dtype()) != self._dtypes[key]:
            raise ValueError(f"{self.path / file} holds {key} as {stored.get_dtype()} {stored.get_shape()}, not as the manifest says")
        if common.sizes == chunk.sizes:
            return handle.get_tensor(stored_name(key, chunk.offsets))
        return stored[common.slices(chunk.offsets)]
