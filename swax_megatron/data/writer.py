"""Writing a data set folder: tar shards, an index beside each, and the manifest last.

A shard is a plain tar that the webdataset library reads: each sample is a block of whole documents,

* ``<key>.ids``      the ids of its documents, one after another, little-endian uint16 (uint32 above 65,536 ids),
* ``<key>.lengths``  the number of ids of each document, little-endian uint32,
* ``<key>.mask``     optional: one byte an id, 1 where the id is a training target.

No document is cut: one longer than a member, or than a shard, makes that member or shard longer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from swax_megatron.data.index import IndexHeader, encode_index
from swax_megatron.data.shards import FORMAT_VERSION, MANIFEST, TOKENIZER, fingerprint

_BLOCK = tarfile.BLOCKSIZE  # 512: what tar aligns payloads to
_END = b"\0" * (2 * _BLOCK)


def id_dtype(vocab_size: int) -> np.dtype:
    """The type of stored ids: uint16 up to 65,536 ids, uint32 above."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class _Shard:
    """One tar that is being written, hashed on the way."""

    def __init__(self, folder: Path, name: str, keys: str, dtype: np.dtype) -> None:
        self.folder, self.name, self.keys, self.dtype = folder, name, keys, dtype
        self.bytes = self.documents = self.tokens = 0
        self._members: list[tuple[int, int, int, int]] = []
        self._lengths: list[np.ndarray] = []
        self._sha = hashlib.sha256()
        self._file = open(folder / f"{self.name}.tar", "wb", buffering=0)

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        try:
            while left:  # a raw write may take only a part
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        self._sha.update(data)
        self.bytes += len(data)

    def add(self, ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        """Append one sample that holds whole documents, all its tar members in one write."""
        key = f"{self.keys}{len(self._members):06d}"
        ids_at, mask_at = self.bytes + _BLOCK, 0
        parts = [*_member(f"{key}.ids", ids.astype(self.dtype, copy=False).tobytes())]
        parts += _member(f"{key}.lengths", lengths.astype("<u4").tobytes())
        if mask is not None:
            mask_at = self.bytes + sum(map(len, parts)) + _BLOCK
            parts += _member(f"{key}.mask", mask.astype("u1").tobytes())
        self._write(b"".join(parts))
        self._members.append((ids_at, self.tokens, self.documents, mask_at))
        self._lengths.append(lengths)
        self.tokens += len(ids)
        self.documents += len(lengths)

    def close(self) -> dict[str, Any]:
        """End the tar, write the index, return the shard's entry of the manifest."""
        self._write(_END)
        os.fsync(self._file.fileno())
        self._file.close()
        starts = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths), dtype=np.int64)])
        has_mask = self._members[0][3] > 0
        header = IndexHeader(self.documents, self.tokens, len(self._members), self.bytes, self.dtype.itemsize, has_mask)
        index = encode_index(header, np.array(self._members, np.int64), starts)
        write_synced(self.folder / f"{self.name}.idx", index)
        return {
            "file": f"{self.name}.tar",
            "sha256": self._sha.hexdigest(),
            "bytes": self.bytes,
            "documents": self.documents,
            "tokens": self.tokens,
            "index": f"{self.name}.idx",
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "index_bytes": len(index),
        }

    def abort(self) -> None:
        self._file.close()


class ShardWriter:
    """Documents into numbered shards in ``folder``, which must exist; ``close`` returns their entries of the manifest.

    shard_bytes and member_bytes are targets in bytes; shard_bytes None: everything goes into one shard.
    keys: what the webdataset key of every sample begins with, so that keys of shards written apart stay different.
    first: the number of the first shard.
    Loss masks are given for every block or for none.
    """

    def __init__(
        self,
        folder: str | Path,
        vocab_size: int,
        shard_bytes: int | None = 64 << 20,
        member_bytes: int = 1 << 20,
        keys: str = "",
        first: int = 0,
    ) -> None:
        self.folder, self.vocab_size, self.dtype = Path(folder), vocab_size, id_dtype(vocab_size)
        self._shard_bytes, self._keys, self._first = shard_bytes, keys, first
        self._member_tokens = max(1, min(member_bytes, shard_bytes or member_bytes) // self.dtype.itemsize)
        self._open: _Shard | None = None
        self._entries: list[dict[str, Any]] = []
        self._blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._pending = 0
        self._has_mask: bool | None = None
        self.documents = self.tokens = self.text_bytes = 0

    @property
    def has_mask(self) -> bool:
        """Whether the blocks came with loss masks."""
        return bool(self._has_mask)

    def add(self, ids: np.ndarray, lengths: np.ndarray, *, text_bytes: int = 0, mask: np.ndarray | None = None) -> None:
        """Append documents: ``ids`` (N,) one after another with their EOS, ``lengths`` (D,) >= 1 with sum N, ``mask`` (N,) of 0 and 1.

        Raises ValueError where they do not fit each other or the vocabulary, OSError where the disk is full.
        """
        lengths = np.asarray(lengths, np.int64)
        if int(lengths.sum()) != len(ids) or (lengths < 1).any() or (mask is not None and len(mask) != len(ids)):
            raise ValueError(f"lengths (sum {int(lengths.sum())}) and mask must fit the {len(ids)} ids, with no empty document")
        if len(lengths) == 0:
            return
        if int(ids.max()) >= self.vocab_size or int(ids.min()) < 0:
            raise ValueError(f"ids from {int(ids.min())} to {int(ids.max())} do not fit vocab_size={self.vocab_size}")
        if self._has_mask not in (None, mask is not None):
            raise ValueError("mask must be given for every block of a data set or for none")
        self._has_mask = mask is not None
        self.documents, self.tokens, self.text_bytes = self.documents + len(lengths), self.tokens + len(ids), self.text_bytes + text_bytes
        self._blocks.append((ids, lengths, mask))
        self._pending += len(ids)
        if self._pending >= self._member_tokens:
            self._flush(everything=False)

    def _flush(self, everything: bool) -> None:
        """Cut what is pending into members at document boundaries; a last short one waits unless ``everything``."""
        ids = np.concatenate([block[0] for block in self._blocks])
        lengths = np.concatenate([block[1] for block in self._blocks])
        mask = np.concatenate([block[2] for block in self._blocks]) if self._has_mask else None
        ends = np.cumsum(lengths)
        first = start = 0
        while first < len(lengths) and (everything or len(ids) - start >= self._member_tokens):
            last = max(first + 1, int(np.searchsorted(ends, start + self._member_tokens, side="right")))
            stop = int(ends[last - 1])
            self._write_member(ids[start:stop], lengths[first:last], None if mask is None else mask[start:stop])
            first, start = last, stop
        self._pending = len(ids) - start
        self._blocks = [(ids[start:], lengths[first:], None if mask is None else mask[start:])] if self._pending else []

    def _write_member(self, ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        size = len(ids) * (self.dtype.itemsize + (mask is not None)) + 4 * len(lengths)
        if self._open is not None and self._shard_bytes is not None and self._open.bytes + size > self._shard_bytes:
            self._entries.append(self._open.close())
            self._open = None
        if self._open is None:
            number = self._first + len(self._entries)
            self._open = _Shard(self.folder, shard_name(number), f"{self._keys}{number:06d}-", self.dtype)
        self._open.add(ids, lengths, mask)

    def close(self) -> list[dict[str, Any]]:
        """Write what is pending; the entries of all shards, none where no document was added."""
        if self._blocks:
            self._flush(everything=True)
            self._blocks = []
        if self._open is not None:
            self._entries.append(self._open.close())
            self._open = None
        return self._entries

    def abort(self) -> None:
        """Close the open file after an error; what lies in the folder is not to be used."""
        if self._open is not None:
            self._open.abort()
            self._open = None


class DatasetWriter(ShardWriter):
    """Writes one data set into ``folder``, which must exist; whole only once ``finish`` has written the manifest."""

    def finish(self, tokenizer: str | Path, special_ids: dict[str, int], **notes: Any) -> dict[str, Any]:
        """Write what is pending, the tokenizer and, last, the manifest; returns the manifest (see ``write_manifest``)."""
        entries = self.close()
        return write_manifest(self.folder, entries, self.text_bytes, tokenizer, self.vocab_size, special_ids, self.has_mask, **notes)


def shard_name(number: int) -> str:
    """The name of a shard's files, without what follows the dot."""
    return f"shard-{number:06d}"


def _member(name: str, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """A tar member: header, payload, and the zeros up to the next block."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(payload), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT), payload, b"\0" * (-len(payload) % _BLOCK)


def write_manifest(
    folder: Path,
    entries: list[dict[str, Any]],
    text_bytes: int,
    tokenizer: str | Path,
    vocab_size: int,
    special_ids: dict[str, int],
    loss_mask: bool = False,
    **notes: Any,
) -> dict[str, Any]:
    """Complete a folder of shards: a copy of the tokenizer and, last, the manifest, which is returned.

    entries: what ``ShardWriter.close`` returned, in the order of the data set; ``text_bytes`` of UTF-8 text are in them.
    special_ids: unk_id, bos_id and eos_id.  notes: JSON values such as sources and options, stored as they are.
    Raises ValueError where there is no shard.
    """
    if not entries:
        raise ValueError("no document was added: a data set must hold at least one")
    copy = folder / TOKENIZER
    shutil.copyfile(tokenizer, copy)
    sync(copy)
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": id_dtype(vocab_size).name,
        "loss_mask": loss_mask,
        "tokenizer": {"file": TOKENIZER, "sha256": fingerprint(copy), "vocab_size": vocab_size, **special_ids},
        "totals": {
            "shards": len(entries),
            "documents": sum(entry["documents"] for entry in entries),
            "tokens": sum(entry["tokens"] for entry in entries),
            "text_bytes": text_bytes,
            "bytes": sum(entry["bytes"] for entry in entries),
        },
        **notes,
        "shards": entries,
    }
    write_synced(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    sync(folder)
    return manifest


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on the disk; OSError, which names the file, where the disk is full."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Make a file's content, or the renames and new names inside a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
