"""From the shards of segments to the shards of a data set: small neighbours are joined, duplicates left out.

Shards of a segment that are full size stay as they are. The others are joined with their neighbours as long as the sum fits
one shard. What is joined depends on the corpus and the options alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.workfolder import WorkFolder
from swax_megatron.data.index import read_index
from swax_megatron.data.writer import ShardWriter, id_dtype, shard_name, sync, write_synced

ENTRY = "entry.json"


@dataclass(frozen=True)
class Piece:
    """One shard of a segment, less ``dropped`` duplicates: ``repeats`` lists those of the segment, of which the shard has
    documents ``first`` and following."""

    folder: str
    entry: dict[str, Any]
    keys: str
    source: int
    number: int
    first: int = 0
    repeats: str | None = None
    dropped: int = 0

    def drop(self) -> np.ndarray:
        """The numbers inside the shard of the documents that are left out, sorted: int64."""
        if not self.dropped:
            return np.empty(0, np.int64)
        repeats = np.sort(np.fromfile(self.repeats, "<i8")) - self.first
        return repeats[(repeats >= 0) & (repeats < self.entry["documents"])]

    def kept(self, item_size: int) -> tuple[int, int, int]:
        """Documents, tokens, and bytes of the tar, of what stays."""
        entry = self.entry
        if not self.dropped:
            return entry["documents"], entry["tokens"], entry["bytes"]
        lengths = read_index(Path(self.folder) / entry["index"]).lengths
        tokens = int(lengths[self.drop()].sum())
        return entry["documents"] - self.dropped, entry["tokens"] - tokens, entry["bytes"] - tokens * item_size - 4 * self.dropped


@dataclass(frozen=True)
class Group:
    """Pieces that make one shard."""

    pieces: tuple[Piece, ...]
    vocab_size: int

    @property
    def documents(self) -> int:
        """How many the shard will hold."""
        return sum(piece.entry["documents"] - piece.dropped for piece in self.pieces)

    @property
    def as_it_is(self) -> bool:
        """Whether nothing needs to be written."""
        return len(self.pieces) == 1 and not self.pieces[0].dropped

    @property
    def place(self) -> tuple[int, ...]:
        """Where it stands in the corpus."""
        return tuple(int(part) for part in f"{self.pieces[0].keys}{self.pieces[0].number}".split("-"))

    @property
    def name(self) -> str:
        """A file name that changes with what goes into the shard."""
        content = [[piece.folder, piece.entry["sha256"], hashlib.sha256(piece.drop().tobytes()).hexdigest()] for piece in self.pieces]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def groups(pieces: Iterable[Piece], vocab_size: int, shard_size: int) -> Iterator[Group]:
    """Neighbouring pieces together, as many as fit ``shard_size`` bytes; pieces of which nothing stays are left out."""
    waiting: list[Piece] = []
    size = 0
    for piece in pieces:
        documents, _, kept = piece.kept(id_dtype(vocab_size).itemsize)
        if not documents:
            continue
        if waiting and size + kept > shard_size:
            yield Group(tuple(waiting), vocab_size)
            waiting, size = [], 0
        waiting.append(piece)
        size += kept
    if waiting:
        yield Group(tuple(waiting), vocab_size)


def join(group: Group, work: WorkFolder) -> dict[str, Any]:
    """Write a group's shard into the work folder, unless it is there; returns its entry."""
    final = work.joined / group.name
    if (final / ENTRY).exists():
        return json.loads((final / ENTRY).read_text())
    aside = work.joined / f"{group.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    first = group.pieces[0]
    writer = ShardWriter(aside, group.vocab_size, None, keys=first.keys, first=first.number)
    try:
        for piece in group.pieces:
            for ids, lengths in _documents(piece, writer.dtype):
                writer.add(ids, lengths)
        (entry,) = writer.close()
        write_synced(aside / ENTRY, json.dumps(entry).encode())
        sync(aside)
        os.rename(aside, final)
        return entry
    finally:
        writer.abort()
        shutil.rmtree(aside, ignore_errors=True)


def _documents(piece: Piece, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of a piece that stay, a member at a time: ids (N,), lengths (D,)."""
    tar, index = Path(piece.folder) / piece.entry["file"], read_index(Path(piece.folder) / piece.entry["index"])
    bounds = np.append(index.members[:, 2], index.header.documents)
    keep = np.ones(index.header.documents, bool)
    keep[piece.drop()] = False
    for number, offset in enumerate(index.members[:, 0]):
        first, last = bounds[number], bounds[number + 1]
        lengths = index.lengths[first:last]
        ids = np.fromfile(tar, dtype, count=int(lengths.sum()), offset=int(offset))
        chosen = keep[first:last]
        yield (ids, lengths) if chosen.all() else (ids[np.repeat(chosen, lengths)], lengths[chosen])


def place_shards(done: Iterable[tuple[Path, dict[str, Any]]], folder: Path) -> list[dict[str, Any]]:
    """Give shards, given as (folder, entry), their numbers in a data set's folder; returns their entries there."""
    entries = []
    for number, (origin, entry) in enumerate(done):
        name = shard_name(number)
        for key, ending in (("file", "tar"), ("index", "idx")):
            _link(origin / entry[key], folder / f"{name}.{ending}")
        entries.append({**entry, "file": f"{name}.tar", "index": f"{name}.idx"})
    return entries


def _link(origin: Path, name: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(origin, name)
    except OSError:
        shutil.copyfile(origin, name)
        sync(name)
