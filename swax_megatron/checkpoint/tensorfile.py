"""One safetensors file: written tensor by tensor with its sha256 on the way, read by ranges.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, the raw little-endian data. Writing it here and not with ``save_file`` keeps one
tensor at a time in host memory, hashes the bytes that are written, and ends with an fsync.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

BLOCK = 16 << 20

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype; ValueError where a checkpoint cannot hold it."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"a checkpoint cannot hold {dtype}: convert the tensor to one of {', '.join(map(str, DTYPE_NAMES))}")
    return DTYPE_NAMES[dtype]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a new safetensors file and fsync it; returns {"sha256": hex, "bytes": size}. Tensors may live on any device."""
    header: dict[str, Any] = {}
    position = 0
    # Widest elements first, as safetensors itself does: every tensor stays aligned in a memory map.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with DurableWriter(path) as file:
        for block in _blocks(text, names, tensors):
            file.write(block)
    return {"sha256": file.sha256, "bytes": file.bytes}


class DurableWriter:
    """A new file, hashed as it is written, fsynced at the end of the ``with`` block."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self.bytes = path, hashlib.sha256(), 0

    def __enter__(self) -> DurableWriter:
        self._file = open(self._path, "xb", buffering=0)
        return self

    def write(self, block: bytes | memoryview) -> None:
        self._digest.update(block)
        self.bytes += len(block)
        view = memoryview(block)
        while view:  # an unbuffered write may be short
            view = view[self._file.write(view) :]

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _blocks(header: bytes, names: list[str], tensors: dict[str, Tensor]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
        raw = memoryview(tensor.view(torch.uint8).numpy())
        for start in range(0, len(raw), BLOCK):
            yield raw[start : start + BLOCK]


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file; ``progress`` is told the bytes of every block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def sha256_on_disk(path: Path) -> str:
    """Hex digest of a file that was fsynced, its pages dropped from the cache first where the system does that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return sha256_of(path)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file; what the library refuses becomes a ValueError that names the file."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cannot be read ({error}): move it away to use an older one") from error
