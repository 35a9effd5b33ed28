"""Cutting a stream into records by position: lines, and the records of WARC-derived text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from data_prep.streams import BLOCK, ByteStream

try:
    import orjson
except ImportError:  # only slower
    orjson = None


def go_to_line(stream: ByteStream, start: int) -> None:
    """Go to the first line that begins at or after a position."""
    if stream.mark != start and start:
        stream.advance(start - 1)
        _skip_line(stream)


def lines(stream: ByteStream, stop: int, limit: int) -> Iterator[list[tuple[int, bytes | None]]]:
    """(position, line) of the lines from here on that begin before ``stop``; None for a line longer than ``limit`` bytes."""
    while stream.base < stop:
        cut = stream.buffer.rfind(b"\n") + 1
        if not cut:
            if not stream.fill():
                if stream.buffer:
                    yield [_limited(stream.base, stream.buffer, limit)]
                    stream.advance(stream.base + len(stream.buffer))
                break
            if len(stream.buffer) > limit and b"\n" not in stream.buffer:
                place = stream.base
                _skip_line(stream)
                yield [(place, None)]
            continue
        if stream.base + cut > stop:
            cut = stream.buffer.find(b"\n", stop - 1 - stream.base) + 1
        place, found = stream.base, []
        for line in stream.buffer[: cut - 1].split(b"\n"):
            found.append(_limited(place, line, limit))
            place += len(line) + 1
        stream.advance(place)
        yield found
    stream.mark = stop


def _limited(place: int, line: bytes, limit: int) -> tuple[int, bytes | None]:
    return place, None if len(line) > limit else line


def _skip_line(stream: ByteStream) -> None:
    """Go behind the next newline, or to the end."""
    while (at := stream.buffer.find(b"\n")) < 0:
        stream.advance(stream.base + len(stream.buffer))
        if not stream.fill():
            return
    stream.advance(stream.base + at + 1)


def line_number(stream: ByteStream, position: int) -> int:
    """1-based number of the line at a position: counted anew, for errors only."""
    again = ByteStream(stream.path, stream.name)
    number = 1
    while again.base < position and again.fill():
        number += again.buffer.count(b"\n", 0, max(0, position - again.base))
        again.advance(again.base + len(again.buffer))
    again.close()
    return number


def plain_json_text(line: bytes, key: str) -> bytes | None:
    """The UTF-8 of the string under a key of a JSON object, read by the faster library; None where ``json_text`` must look."""
    try:
        value = orjson.loads(line)[key] if orjson else None
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return value.encode() if isinstance(value, str) else None


def json_text(text: str, key: str) -> str:
    """The string under a key of a JSON object; ValueError where there is none."""
    try:
        record = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict) or key not in record:
        found = f"it has {', '.join(map(repr, list(record)[:8]))}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        raise ValueError(f"no key {key!r} ({found}); choose one with --text-key")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a string")
    return value


def warc_texts(stream: ByteStream, start: int, stop: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(position, payload) of the ``conversion`` records that begin in [start, stop); None for a payload longer than ``limit``.

    Records are only found one after another from the beginning of the file.
    """
    _skip_blank(stream)
    while stream.base < stop and stream.buffer:
        place = stream.base
        header, kind, length = _warc_header(stream)
        end = place + header + length
        payload = None
        wanted = place >= start and kind == b"conversion"
        if wanted and length <= limit:
            stream.advance(place + header)
            while len(stream.buffer) < length and stream.fill():
                pass
            payload = stream.buffer[:length]
        stream.advance(end)
        if stream.base < end or (payload is not None and len(payload) < length):
            raise ValueError(f"{stream.name} is cut short: copy it again")
        _skip_blank(stream)
        if wanted:
            yield place, payload
    stream.mark = stop


def _skip_blank(stream: ByteStream) -> None:
    """Go to the next record, or to the end."""
    while True:
        kept = stream.buffer.lstrip(b"\r\n")
        stream.advance(stream.base + len(stream.buffer) - len(kept))
        if stream.buffer or not stream.fill():
            return


def _warc_header(stream: ByteStream) -> tuple[int, bytes, int]:
    """(bytes of the header, WARC-Type, Content-Length) of the record at the stream's base."""
    while (end := stream.buffer.find(b"\r\n\r\n")) < 0:
        if len(stream.buffer) > BLOCK or not stream.fill():
            break
    first, *rest = stream.buffer[: max(0, end)].split(b"\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in rest)}
    length = fields.get(b"content-length", b"")
    if not first.startswith(b"WARC/") or not length.isdigit():
        raise ValueError(f"{stream.name} holds no whole WARC record at byte {stream.base}: copy it again")
    return end + 4, fields.get(b"warc-type", b""), int(length)
