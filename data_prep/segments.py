"""A corpus in segments: pieces of input that are read, encoded and written apart, and that decide the output's bytes.

A task is one file, or a group of small text files. Segment k of a task holds the records that begin in its uncompressed
bytes [k S, (k + 1) S); how many segments a compressed file has is known only to who reads it. S depends on the size of
the whole input alone, so neither workers nor nodes change what a segment is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from data_prep.inputs import Input, Source, list_inputs

SMALLEST = 4 << 20
GROUP_FILES = 4096


@dataclass(frozen=True)
class Task:
    """Files that one reader goes through; ``segments`` is None where only reading tells how many there are."""

    number: int
    source: int
    text_key: str
    kind: str
    inputs: tuple[Input, ...]
    segment_bytes: int
    segments: int | None

    @property
    def bytes(self) -> int:
        """Size of the files, compressed as they are; 0 where it is not known."""
        return sum(item.bytes or 0 for item in self.inputs)

    @property
    def remote(self) -> bool:
        """Whether the files must be fetched first."""
        return any(item.remote for item in self.inputs)


@dataclass(frozen=True)
class Segment:
    """Piece ``index`` of a task: the records that begin in [start, stop)."""

    task: Task
    index: int

    @property
    def start(self) -> int:
        """First position."""
        return self.index * self.task.segment_bytes

    @property
    def stop(self) -> int:
        """The position after the last."""
        return (self.index + 1) * self.task.segment_bytes

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the corpus."""
        return self.task.number, self.index

    @property
    def key(self) -> str:
        """What its samples' keys begin with."""
        return f"{self.task.number:06d}-{self.index:05d}-"

    @property
    def name(self) -> str:
        """A file name that changes with the files' names, sizes and times, and with the segment's bounds."""
        text = json.dumps([self.place, self.start, self.stop, asdict(replace(self.task, segments=None))])
        return f"{self.key}{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def plan(sources: Sequence[Source], shard_size: int, segment_bytes: int | None = None) -> list[Task]:
    """The tasks of a corpus in order. ValueError as ``list_inputs`` raises it.

    segment_bytes: S; by default a 64th of the input, rounded down to a power of two, from 4 MiB to twice the shard's size.
    """
    listed = [(number, source, list_inputs(source)) for number, source in enumerate(sources)]
    sizes = [item.bytes for _, _, items in listed for item in items]
    largest = max(SMALLEST, 2 * shard_size)
    if segment_bytes is None:
        total = None if None in sizes else sum(sizes)
        segment_bytes = largest if total is None else min(largest, max(SMALLEST, 1 << max(0, (total // 64).bit_length() - 1)))
    tasks: list[Task] = []
    for number, source, items in listed:
        for kind, group in _groups(items, segment_bytes):
            known = kind == "text" or (kind == "jsonl" and not group[0].remote and group[0].path.lower().endswith(".jsonl"))
            count = 1 if kind == "text" else max(1, -(-(group[0].bytes or 0) // segment_bytes))
            tasks.append(Task(len(tasks), number, source.text_key, kind, tuple(group), segment_bytes, count if known else None))
    return tasks


def _groups(items: Sequence[Input], segment_bytes: int) -> Iterator[tuple[str, list[Input]]]:
    """Each file alone, but text files together up to a segment."""
    group: list[Input] = []
    size = 0
    for item in items:
        if item.kind != "text":
            if group:
                yield "text", group
                group, size = [], 0
            yield item.kind, [item]
            continue
        if group and (size + (item.bytes or 0) > segment_bytes or len(group) >= GROUP_FILES):
            yield "text", group
            group, size = [], 0
        group.append(item)
        size += item.bytes or 0
    if group:
        yield "text", group


def share(tasks: Sequence[Task], part: int, parts: int) -> Iterator[tuple[Task, list[int] | None]]:
    """The tasks of part ``part`` (0-based) of ``parts`` with the indices of its segments (None: all of them)."""
    count = 0
    for task in tasks:
        if task.segments is None:
            if count % parts == part:
                yield task, None
            count += 1
        else:
            mine = [index for index in range(task.segments) if (count + index) % parts == part]
            count += task.segments
            if mine:
                yield task, mine
