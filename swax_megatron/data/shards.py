"""A data set folder, opened for random access: manifest.json, tar shards, an index beside each tar, tokenizer.model.

Nothing is extracted and nothing is looked up by a tar member's name: the index gives byte offsets, the tars are
memory-mapped. Opening reads the manifest and 64 bytes of each index; document tables are read when a shard is used.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swax_megatron.data.index import ShardIndex, read_header, read_index

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_ENTRY = ("file", "sha256", "bytes", "documents", "tokens", "index", "index_sha256", "index_bytes")


def fingerprint(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class OpenShard:
    """A mapped tar with its index.

    ``ids`` is the whole tar as items of the id type and ``bytes`` the same as uint8; ``id_offsets`` and
    ``mask_offsets`` (D,) say where in them each document begins, ``lengths`` (D,) how many ids it has.
    """

    index: ShardIndex
    ids: np.ndarray
    bytes: np.ndarray
    id_offsets: np.ndarray
    mask_offsets: np.ndarray | None
    lengths: np.ndarray


class ShardedDataset:
    """A folder written by data_prep/shard.py.

    path: the folder that holds manifest.json.
    verify: "size" compares the size of every file with the manifest and every index header with its shard; "sha256"
        also hashes every file (minutes for a large corpus: do it once a node, not once a rank).
    max_open_shards: shards kept mapped at once; each holds one file descriptor.

    Raises ValueError where the folder is incomplete, damaged, or newer than this program. Not thread-safe.
    """

    def __init__(self, path: str | Path, verify: str = "size", max_open_shards: int = 128) -> None:
        if verify not in ("size", "sha256"):
            raise ValueError(f"verify={verify!r}: must be 'size' or 'sha256'")
        self.path = Path(path)
        self.manifest, self.fingerprint = _read_manifest(self.path)
        try:
            self._read_fields()
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path / MANIFEST} lacks or misstates {error}; write the data set again") from error
        self._max_open = max(1, max_open_shards)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._check(verify)

    def _read_fields(self) -> None:
        manifest, tokenizer = self.manifest, self.manifest["tokenizer"]
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"{self.path / MANIFEST} has dtype={manifest['dtype']!r}: ids are stored as uint16 or uint32")
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.has_mask: bool = bool(manifest["loss_mask"])
        self.vocab_size, self.eos_id = int(tokenizer["vocab_size"]), int(tokenizer["eos_id"])
        self.tokenizer_sha256 = str(tokenizer["sha256"])
        self.tokenizer_path = self._inside(tokenizer["file"])
        self.shards: list[dict[str, Any]] = manifest["shards"]
        for entry in self.shards:
            if missing := [key for key in _ENTRY if key not in entry]:
                raise KeyError(missing[0])
        self.files = [(self._inside(entry["file"]), self._inside(entry["index"])) for entry in self.shards]
        self.shard_documents = np.array([entry["documents"] for entry in self.shards], np.int64)
        self.shard_tokens = np.array([entry["tokens"] for entry in self.shards], np.int64)
        self.documents, self.tokens = int(self.shard_documents.sum()), int(self.shard_tokens.sum())
        self.text_bytes = int(manifest["totals"]["text_bytes"])
        if not self.shards:
            raise ValueError(f"{self.path / MANIFEST} lists no shard; write the data set again with data_prep/shard.py")

    def _inside(self, name: str) -> Path:
        """A file of this folder; a manifest may not point elsewhere."""
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{self.path / MANIFEST} names the file {name!r}: only plain names inside the data set folder are allowed")
        return self.path / name

    def _check(self, verify: str) -> None:
        if not self.tokenizer_path.is_file() or fingerprint(self.tokenizer_path) != self.tokenizer_sha256:
            raise ValueError(f"{self.tokenizer_path} is missing or is not the tokenizer that wrote this data set; copy the data set again")
        for number, (tar, index) in enumerate(self.files):
            entry = self.shards[number]
            for file, size in ((tar, entry["bytes"]), (index, entry["index_bytes"])):
                if not file.is_file():
                    raise ValueError(f"shard file {file} is missing; copy the data set again")
                if file.stat().st_size != size:
                    raise ValueError(f"{file} has {file.stat().st_size} bytes where the manifest states {size}; copy the data set again")
            header = read_header(index)
            stated = (entry["documents"], entry["tokens"], entry["bytes"], self.dtype.itemsize, self.has_mask)
            if (header.documents, header.tokens, header.tar_bytes, header.item_size, header.has_mask) != stated:
                raise ValueError(f"index {index} does not belong to {tar.name} as the manifest states it; copy the data set again")
            if verify == "sha256":
                for file, digest in ((tar, entry["sha256"]), (index, entry["index_sha256"])):
                    if fingerprint(file) != digest:
                        raise ValueError(f"{file} is damaged: its sha256 is not the manifest's; copy the data set again")

    def check_tokenizer(self, sha256: str | None = None, vocab_size: int | None = None) -> None:
        """Refuse a tokenizer other than the data set's: ValueError if the fingerprint or the vocabulary differs."""
        if sha256 is not None and sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"data set {self.path} was written with the tokenizer {self.tokenizer_sha256[:12]}, not {sha256[:12]}: "
                "shard it again or use the tokenizer.model beside it"
            )
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(f"data set {self.path} has {self.vocab_size} ids, not {vocab_size}: set vocab_size={self.vocab_size}")

    def shard(self, number: int) -> OpenShard:
        """Shard ``number``, mapped; the least recently used one is closed when too many are open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        tar, index_file = self.files[number]
        index = read_index(index_file)
        if index.header.tar_bytes != tar.stat().st_size:
            raise ValueError(f"{tar} changed since the data set was opened; copy the data set again")
        raw = np.asarray(np.memmap(tar, np.uint8, mode="r"))
        mask_offsets = index.document_offsets(3, 1) if self.has_mask else None
        id_offsets = index.document_offsets(0, self.dtype.itemsize)
        opened = OpenShard(index, raw.view(self.dtype), raw, id_offsets, mask_offsets, index.lengths)
        self._open[number] = opened
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)
        return opened

    def document(self, shard: int, number: int) -> np.ndarray:
        """The ids of one document with its EOS: a read-only view (length,) of the mapped tar."""
        opened = self.shard(shard)
        start, length = int(opened.id_offsets[number]), int(opened.lengths[number])
        return opened.ids[start : start + length]

    def document_mask(self, shard: int, number: int) -> np.ndarray:
        """The loss mask of one document: (length,) bool, all true where the data set has none."""
        opened = self.shard(shard)
        length = int(opened.lengths[number])
        if opened.mask_offsets is None:
            return np.ones(length, bool)
        start = int(opened.mask_offsets[number])
        return opened.bytes[start : start + length] != 0

    def blocks(self, shard: int) -> Iterator[np.ndarray]:
        """The ids of a shard in stored order, one member at a time: read-only views."""
        opened = self.shard(shard)
        members = opened.index.members
        tokens = np.diff(np.append(members[:, 1], opened.index.header.tokens))
        for offset, length in zip(members[:, 0] // self.dtype.itemsize, tokens, strict=True):
            yield opened.ids[offset : offset + length]


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest and the sha256 of its bytes, which names the data set."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        inner = sorted(child.name for child in folder.iterdir() if (child / MANIFEST).is_file()) if folder.is_dir() else []
        hint = f"it holds the data sets {', '.join(inner)}: give {folder / inner[0]}" if inner else "write one with data_prep/shard.py"
        raise ValueError(f"no data set in {folder} ({MANIFEST}: {error.strerror}); {hint}") from error
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the data set again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is not the manifest of a data set: it has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}, newer than this program's {FORMAT_VERSION}: update swax_megatron")
    return manifest, hashlib.sha256(raw).hexdigest()
