"""The index beside each tar: where every document of a shard lies.

One flat array of little-endian uint64 words, so that ``numpy.memmap(path, "<u8")`` is the whole parser:

* 8 words of header: magic, version, documents D, tokens, members M, bytes of the tar, bytes an id, 1 if there are loss masks;
* M rows of 4 words: byte offset of the member's ids, its first token, its first document, byte offset of its loss mask (0: none);
* D + 1 words: the first token of each document, counted from the start of the shard, then the shard's number of tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = int.from_bytes(b"SWAXIDX\0", "little")
INDEX_VERSION = 1
HEADER_WORDS = 8
MEMBER_WORDS = 4


@dataclass(frozen=True)
class IndexHeader:
    """The counts of a shard as its index states them."""

    documents: int
    tokens: int
    members: int
    tar_bytes: int
    item_size: int
    has_mask: bool

    @property
    def words(self) -> int:
        """Length of the whole index in 8-byte words."""
        return HEADER_WORDS + MEMBER_WORDS * self.members + self.documents + 1


@dataclass(frozen=True)
class ShardIndex:
    """A parsed index: ``members`` (M, 4) and ``starts`` (D + 1), both int64."""

    header: IndexHeader
    members: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its EOS included: (D,) int64."""
        return np.diff(self.starts)

    def document_offsets(self, column: int, item_size: int) -> np.ndarray:
        """Position of each document in the tar, in items of ``item_size`` bytes: (D,) int64.

        ``column`` is 0 for the ids and 3 for the loss mask. Payloads are 512-byte aligned, so the division is exact.
        """
        shift = self.members[:, column] // item_size - self.members[:, 1]
        first = self.members[:, 2]
        counts = np.diff(np.append(first, self.header.documents))
        return self.starts[:-1] + np.repeat(shift, counts)


def encode_index(header: IndexHeader, members: np.ndarray, starts: np.ndarray) -> bytes:
    """The bytes of an index file."""
    head = [MAGIC, INDEX_VERSION, header.documents, header.tokens, header.members, header.tar_bytes, header.item_size, header.has_mask]
    words = np.concatenate([np.array(head, "<u8"), np.asarray(members).astype("<u8").ravel(), np.asarray(starts).astype("<u8")])
    return words.tobytes()


def read_header(path: str | Path, stated: int | None = None) -> IndexHeader:
    """The header of an index; ValueError where the file is none, newer than this program, or of the wrong length.

    stated: its size in bytes according to the manifest. One file is opened and 64 bytes are read, nothing ahead of them: a
    data set has thousands of indices, and network file systems are slow.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            raw = os.pread(descriptor, 8 * HEADER_WORDS, 0)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ValueError(f"shard file {path} is missing; copy the data set again") from None
    except OSError as error:
        raise ValueError(f"index {path} cannot be read: {error.strerror}; copy the data set again") from error
    if stated is not None and size != stated:
        raise ValueError(f"{path} has {size} bytes where the manifest states {stated}; copy the data set again")
    return _header(np.frombuffer(raw[: len(raw) // 8 * 8], "<u8"), size, str(path))


def read_index(path: Path) -> ShardIndex:
    """The whole index, checked against itself; raises ValueError as ``read_header`` does."""
    read_header(path)
    return parse_index(np.fromfile(path, np.uint8), str(path))


def parse_index(raw: np.ndarray, name: str) -> ShardIndex:
    """The index in the bytes ``raw`` (size,) uint8, as views of them, checked; ``name`` is for messages."""
    words = raw[: len(raw) // 8 * 8].view("<i8")
    header = _header(words[:HEADER_WORDS].view("<u8"), len(raw), name)
    members = words[HEADER_WORDS : HEADER_WORDS + MEMBER_WORDS * header.members].reshape(-1, MEMBER_WORDS)
    starts = words[HEADER_WORDS + MEMBER_WORDS * header.members :]
    index = ShardIndex(header, members, starts)
    if not _consistent(index):
        raise ValueError(f"index {name} contradicts itself; copy the data set again")
    return index


def _header(words: np.ndarray, size: int, name: str) -> IndexHeader:
    if len(words) < HEADER_WORDS or int(words[0]) != MAGIC:
        raise ValueError(f"index {name} is not a shard index; copy the data set again")
    if int(words[1]) > INDEX_VERSION:
        raise ValueError(f"index {name} has version {int(words[1])}, newer than this program's {INDEX_VERSION}: update swax_megatron")
    header = IndexHeader(*(int(word) for word in words[2:7]), has_mask=bool(words[7]))
    if size != 8 * header.words:
        raise ValueError(f"index {name} has {size} bytes where its header states {8 * header.words}; copy the data set again")
    return header


def _consistent(index: ShardIndex) -> bool:
    header, members, starts = index.header, index.members, index.starts
    if header.item_size not in (2, 4) or header.documents < 1 or header.members < 1:
        return False
    if starts[0] != 0 or starts[-1] != header.tokens or (np.diff(starts) < 1).any():
        return False
    first = members[:, 2]
    if first[0] != 0 or (np.diff(first) < 1).any() or first[-1] >= header.documents or (members[:, 1] != starts[first]).any():
        return False
    tokens = np.diff(np.append(members[:, 1], header.tokens))
    aligned = (members[:, 0] % 512 == 0).all() and (members[:, 3] % 512 == 0).all()
    fits = (members[:, 0] > 0).all() and (members[:, 0] + tokens * header.item_size <= header.tar_bytes).all()
    mask_fits = not header.has_mask or ((members[:, 3] > 0).all() and (members[:, 3] + tokens <= header.tar_bytes).all())
    return bool(aligned and fits and mask_fits)
