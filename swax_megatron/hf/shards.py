"""Sharded safetensors as transformers reads them, written with one tensor in memory at a time.

Format: huggingface.co/docs/safetensors; ``model.safetensors.index.json`` maps each tensor to its file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: dict[str, Planned], max_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the given order; a file exceeds ``max_bytes`` only where one tensor does."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shards(
    folder: Path,
    tensors: dict[str, Planned],
    read: Callable[[str], Tensor],
    max_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write every shard, the index where there are several, and check what was written.

    ``read(name)`` gives a tensor of the planned shape and type; ``progress`` is told the bytes of each tensor written.
    """
    files = plan_shards(tensors, max_bytes)
    for file, names in files.items():
        _write(folder / file, {name: tensors[name] for name in names}, read, progress)
        _check(folder / file, {name: tensors[name] for name in names})
    if len(files) > 1:
        totals = {
            "total_parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
            "total_size": sum(tensor.bytes for tensor in tensors.values()),
        }
        weight_map = {name: file for file, names in files.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, tensors: dict[str, Planned], read: Callable[[str], Tensor], progress: Callable[[int], None] | None) -> None:
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # widest first: all stay aligned in a memory map
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        end = position + tensors[name].bytes
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = read(name).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            del tensor  # before the next one is read
            if progress is not None:
                progress(tensors[name].bytes)
        file.flush()
        os.fsync(file.fileno())


def _check(path: Path, tensors: dict[str, Planned]) -> None:
    """OSError where a file does not hold what was planned (the library compares the header with the file's size)."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    except SafetensorError as error:
        raise OSError(f"{path} was not written correctly ({error}): is the disk full or damaged?") from error
    if found != {name: tensor.shape for name, tensor in tensors.items()}:
        raise OSError(f"{path} does not hold the tensors that were written: is the disk damaged?")
