"""The documents of a segment, in batches of about a mebibyte: JSON lines, Parquet rows, WARC-derived text, whole text files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.inputs import Input
from data_prep.records import go_to_line, json_text, line_number, lines, plain_json_text, warc_texts
from data_prep.segments import Segment
from data_prep.streams import BLOCK, ByteStream

PARQUET_ROWS = 256


@dataclass(frozen=True)
class ReadOptions:
    """What becomes of records that are no good document: "error" raises ValueError, "skip" counts them.

    invalid_utf8 may also be "replace", which puts U+FFFD. max_record_bytes bounds the memory for one line, cell or file.
    """

    invalid_utf8: str = "error"
    bad_records: str = "error"
    long_documents: str = "error"
    max_record_bytes: int = 64 << 20


@dataclass
class Batch:
    """Documents as UTF-8 with the place of each; ``describe`` makes a place readable; ``raw_bytes`` of input were read for it."""

    describe: Callable[[Any], str]
    texts: list[bytes] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    raw_bytes: int = 0
    size: int = 0

    def origin(self, number: int) -> str:
        """Where document ``number`` came from."""
        return self.describe(self.places[number])

    def skip(self, reason: str) -> None:
        """Count a record that gives no document."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class SegmentReader:
    """Reads one segment after another; the next one of the same compressed file goes on where the last one stopped.

    locate: (input of a task) -> its local path.
    """

    def __init__(self, options: ReadOptions, locate: Callable[[Input], str] = lambda item: item.path) -> None:
        self._options, self._locate = options, locate
        self._stream: ByteStream | None = None
        self._end = True

    def read(self, segment: Segment) -> Iterator[Batch]:
        """The batches of a segment; ValueError names the file, and the line or row, of what is wrong."""
        kinds = {"text": self._text, "parquet": self._parquet, "wet": self._wet, "jsonl": self._jsonl}
        return kinds[segment.task.kind](segment)

    @property
    def at_end(self) -> bool:
        """Whether nothing of the task follows the segment that was just read."""
        return self._end

    def _open(self, segment: Segment, usable: Callable[[ByteStream], bool]) -> ByteStream:
        path = self._locate(segment.task.inputs[0])
        if self._stream is None or self._stream.path != path or not usable(self._stream):
            if self._stream is not None:
                self._stream.close()
            self._stream = ByteStream(path, segment.task.inputs[0].path)
        return self._stream

    def _jsonl(self, segment: Segment) -> Iterator[Batch]:
        start, limit = segment.start, self._options.max_record_bytes
        stream = self._open(segment, lambda known: known.mark == start or known.base < start)
        go_to_line(stream, start)
        before = stream.raw_position()
        for records in lines(stream, segment.stop, limit):
            batch = Batch(lambda place: f"{stream.name} line {line_number(stream, place)}")
            for place, line in records:
                if line is None or line.strip():
                    self._take(batch, place, line, segment.task.text_key)
            before = _raw(batch, stream, before)
            yield batch
        self._end = stream.base < segment.stop or (not stream.buffer and not stream.fill())

    def _wet(self, segment: Segment) -> Iterator[Batch]:
        start, limit = segment.start, self._options.max_record_bytes
        stream = self._open(segment, lambda known: known.mark == start or known.base <= start)
        before = stream.raw_position()

        def describe(place: int) -> str:
            return f"{stream.name} record at byte {place}"

        batch = Batch(describe)
        for place, payload in warc_texts(stream, start, segment.stop, limit):
            self._take(batch, place, payload)
            if batch.size >= BLOCK:
                before = _raw(batch, stream, before)
                yield batch
                batch = Batch(describe)
        _raw(batch, stream, before)
        yield batch
        self._end = stream.base < segment.stop or not stream.buffer

    def _text(self, segment: Segment) -> Iterator[Batch]:
        batch = Batch(str)
        for item in segment.task.inputs:
            try:
                path = Path(self._locate(item))
                length = path.stat().st_size
                data = path.read_bytes() if length <= self._options.max_record_bytes else None
            except OSError as error:
                raise ValueError(f"input {item.path} cannot be read: {error.strerror}") from error
            self._take(batch, item.path, data)
            batch.raw_bytes += length
            if batch.size >= BLOCK:
                yield batch
                batch = Batch(str)
        yield batch
        self._end = True

    def _parquet(self, segment: Segment) -> Iterator[Batch]:
        import pyarrow
        import pyarrow.parquet

        item, key = segment.task.inputs[0], segment.task.text_key
        try:
            # neither a row group nor a column chunk of it is held whole: both may be as large as the file
            with pyarrow.parquet.ParquetFile(self._locate(item), pre_buffer=False, buffer_size=BLOCK) as file:
                _check_column(file.schema_arrow, key, item.path)
                groups, row, self._end = _row_groups(file.metadata, segment)
                rows = max(1, file.metadata.num_rows)
                for cells in file.iter_batches(batch_size=PARQUET_ROWS, columns=[key], row_groups=groups) if groups else ():
                    values = cells.column(0).cast(pyarrow.large_binary()).to_pylist()
                    batch = Batch(lambda place: f"{item.path} row {place}", raw_bytes=(item.bytes or 0) * len(values) // rows)
                    for place, cell in enumerate(values, row):
                        self._cell(batch, place, cell, key)
                    row += len(values)
                    yield batch
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{item.path} is damaged or no Parquet file ({reason}): copy it again") from error

    def _cell(self, batch: Batch, place: int, cell: bytes | None, key: str) -> None:
        if cell is not None:
            self._take(batch, place, cell if len(cell) <= self._options.max_record_bytes else None)
        elif self._options.bad_records == "skip":
            batch.skip("malformed")
        else:
            raise ValueError(f"{batch.describe(place)}: {key!r} is null, not a string; use --bad-records skip to leave such rows out")

    def _take(self, batch: Batch, place: Any, data: bytes | None, key: str | None = None) -> None:
        """Add a record to the batch, or count it as skipped. ``data`` is None where it is too long; ``key`` finds the text in JSON."""
        try:
            if data is None:
                self._too_long()
            if key is not None:
                data = self._json(data, key)
            elif (text := self._decoded(data)) and self._options.invalid_utf8 == "replace":
                data = text.encode()
        except _Skip as skip:
            batch.skip(str(skip))
        except ValueError as error:
            raise ValueError(f"{batch.describe(place)}: {error}") from error
        else:
            batch.texts.append(data)
            batch.places.append(place)
            batch.size += len(data)

    def _too_long(self) -> None:
        if self._options.long_documents == "skip":
            raise _Skip("too_long")
        limit = self._options.max_record_bytes
        raise ValueError(f"more than the {limit} bytes of --max-record-bytes: raise it, or use --long-documents skip")

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self._options.invalid_utf8 == "skip":
                raise _Skip("invalid_utf8") from error
            if self._options.invalid_utf8 == "replace":
                return data.decode("utf-8", "replace")
            raise ValueError(f"not valid UTF-8 at byte {error.start}; use --invalid-utf8 skip or replace") from error

    def _json(self, line: bytes, key: str) -> bytes:
        if (plain := plain_json_text(line, key)) is not None:
            return plain
        text = self._decoded(line)
        try:
            value = json_text(text, key)
        except ValueError as error:
            if self._options.bad_records == "skip":
                raise _Skip("malformed") from error
            raise
        try:
            return value.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can escape and UTF-8 cannot hold
            return self._decoded(value.encode("utf-8", "surrogatepass")).encode()


class _Skip(Exception):
    """A record that is left out; the message is the reason under which it is counted."""


def _raw(batch: Batch, stream: ByteStream, before: int) -> int:
    """Note what was read from the file since ``before``; returns where it stands."""
    now = stream.raw_position()
    batch.raw_bytes = max(0, now - before)
    return now


def _check_column(schema: Any, key: str, path: str) -> None:
    import pyarrow

    if key not in schema.names:
        raise ValueError(f"{path} has no column {key!r} (it has {', '.join(schema.names)}); choose one with --text-key")
    kind = schema.field(key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"column {key!r} of {path} holds {kind}, not strings; choose another with --text-key")


def _row_groups(metadata: Any, segment: Segment) -> tuple[list[int], int, bool]:
    """The row groups that begin in the segment, the 1-based number of their first row, and whether nothing follows them."""
    groups: list[int] = []
    position, row, first = 0, 1, 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if segment.start <= position < segment.stop:
            first = first if groups else row
            groups.append(number)
        position, row = position + max(1, group.total_byte_size), row + group.num_rows
    return groups, first, position <= segment.stop
