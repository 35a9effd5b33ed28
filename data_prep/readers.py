"""Corpora as a deterministic sequence of units of work, each about a mebibyte of documents.

Kinds of files: JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet (.parquet), and anything else as one UTF-8 document.
The units depend on the files alone, so what is made of them does not depend on the number of processes. Splitting into
units happens in the parent; parsing and decoding (``unit_documents``) in the workers.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

UNIT_BYTES = 1 << 20
UNIT_FILES = 256
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z")
DEFAULT_GLOB = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "*.txt")


@dataclass(frozen=True)
class Input:
    """One file of a corpus."""

    path: str
    kind: str  # jsonl | parquet | text
    bytes: int


@dataclass(frozen=True)
class Unit:
    """Documents to parse together. ``first`` is the 1-based line or row of the first one; ``input_bytes`` were read for it.

    payload: kind jsonl: whole lines; parquet: the cells; text: paths that the worker reads.
    """

    kind: str
    path: str
    first: int
    payload: Any
    input_bytes: int


def list_inputs(paths: Sequence[str], globs: Sequence[str] = DEFAULT_GLOB) -> list[Input]:
    """Every file of the corpus in a fixed order: arguments as given, folders walked in sorted order.

    Files inside folders must match one of ``globs``; links to folders are not followed. ValueError if a path does not
    exist, is of an unknown compressed kind, or if nothing is found.
    """
    inputs = []
    for path in paths:
        if os.path.isdir(path):
            for folder, folders, files in os.walk(path):
                folders.sort()
                matching = [name for name in sorted(files) if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
                inputs += [_input(os.path.join(folder, name)) for name in matching]
        elif os.path.isfile(path):
            inputs.append(_input(path))
        else:
            raise ValueError(f"input {path} does not exist")
    if not inputs:
        raise ValueError(f"no file in {', '.join(paths)} matches {' '.join(globs)}; choose others with --glob")
    return inputs


def _input(path: str) -> Input:
    name = os.path.basename(path).lower()
    if name.endswith(_JSONL):
        kind = "jsonl"
    elif name.endswith(".parquet"):
        kind = "parquet"
    elif name.endswith(_COMPRESSED):
        raise ValueError(f"input {path} is of no known kind; known are {' '.join(DEFAULT_GLOB)} and plain UTF-8 text")
    else:
        kind = "text"
    try:
        return Input(path, kind, os.path.getsize(path))
    except OSError as error:
        raise ValueError(f"input {path} cannot be read: {error.strerror}") from error


def iter_units(inputs: Sequence[Input], text_key: str) -> Iterator[Unit]:
    """The corpus in units, in order. ValueError, naming the file, where one is damaged."""
    files: list[str] = []
    size = 0
    for item in inputs:
        if item.kind == "text":
            files.append(item.path)
            size += item.bytes
        if files and (item.kind != "text" or size >= UNIT_BYTES or len(files) >= UNIT_FILES):
            yield Unit("text", files[0], 1, files, size)
            files, size = [], 0
        if item.kind == "jsonl":
            yield from _jsonl_units(item)
        elif item.kind == "parquet":
            yield from _parquet_units(item, text_key)
    if files:
        yield Unit("text", files[0], 1, files, size)


def _jsonl_units(item: Input) -> Iterator[Unit]:
    """Blocks of whole lines."""
    if item.bytes == 0 and item.path.lower().endswith(_COMPRESSED):
        raise ValueError(f"{item.path} is cut short: it has 0 bytes, which no compressed file has; copy it again")
    line, position = 1, 0
    rest: list[bytes] = []
    with open(item.path, "rb") as file:
        for block in _decompressed(item.path, file):
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest.append(block)
                continue
            data = b"".join([*rest, block[:cut]])
            rest = [block[cut:]]
            now = file.tell()
            yield Unit("jsonl", item.path, line, data, now - position)
            line, position = line + data.count(b"\n"), now
        if any(rest):
            yield Unit("jsonl", item.path, line, b"".join(rest), file.tell() - position)


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    """The content of a file in blocks; ValueError where it is damaged or cut short."""
    try:
        if path.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as plain:
                while block := plain.read(UNIT_BYTES):
                    yield block
        elif path.lower().endswith(".zst"):
            yield from _zstd(path, file)
        else:
            while block := file.read(UNIT_BYTES):
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): copy it again") from error


def _zstd(path: str, file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader does not notice a file that was cut short."""
    import zstandard

    decoder, data = zstandard.ZstdDecompressor().decompressobj(), b""
    inside = False
    try:
        while data := data or file.read(UNIT_BYTES // 8):
            inside = True
            if block := decoder.decompress(data):
                yield block
            data = b""
            if decoder.eof:
                data, inside = decoder.unused_data, False
                decoder = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if inside:
        raise ValueError(f"{path} is cut short: copy it again")


def _parquet_units(item: Input, text_key: str) -> Iterator[Unit]:
    """Batches of one column, as bytes, so that invalid UTF-8 meets the same policy as elsewhere."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(item.path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise ValueError(f"{item.path} has no column {text_key!r} (it has {', '.join(names)}); choose one with --text-key")
            kind = file.schema_arrow.field(text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f"column {text_key!r} of {item.path} holds {kind}, not strings; choose another with --text-key")
            row, rows = 1, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                cells = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                yield Unit("parquet", item.path, row, cells, item.bytes * len(cells) // rows)
                row += len(cells)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{item.path} is damaged or no Parquet file ({reason}): copy it again") from error


def unit_documents(unit: Unit, text_key: str, invalid_utf8: str) -> Iterator[tuple[str, str | None]]:
    """Each document of a unit as (where it came from, text); the text is None where it was skipped as invalid UTF-8.

    invalid_utf8: "error" raises ValueError, "skip" gives None, "replace" puts U+FFFD.
    """
    if unit.kind == "text":
        for path in unit.payload:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise ValueError(f"input {path} cannot be read: {error.strerror}") from error
            yield path, _decode(data, path, invalid_utf8)
    elif unit.kind == "parquet":
        for row, cell in enumerate(unit.payload, unit.first):
            origin = f"{unit.path} row {row}"
            if cell is None:
                raise ValueError(f"{origin}: {text_key!r} is null, not a string")
            yield origin, _decode(cell, origin, invalid_utf8)
    else:
        for number, line in enumerate(unit.payload.split(b"\n"), unit.first):
            if line.strip():
                origin = f"{unit.path} line {number}"
                yield origin, _json_text(line, origin, text_key, invalid_utf8)


def _json_text(line: bytes, origin: str, text_key: str, invalid_utf8: str) -> str | None:
    text = _decode(line, origin, invalid_utf8)
    if text is None:
        return None
    try:
        record = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(record, dict) or text_key not in record:
        found = f"it has {', '.join(map(repr, list(record)[:8]))}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
        raise ValueError(f"{origin}: no key {text_key!r} ({found}); choose one with --text-key")
    value = record[text_key]
    if not isinstance(value, str):
        raise ValueError(f"{origin}: {text_key!r} is a {type(value).__name__}, not a string")
    if value.isascii():
        return value
    try:
        value.encode()
        return value
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape and UTF-8 cannot hold
        return _decode(value.encode("utf-8", "surrogatepass"), origin, invalid_utf8)


def _decode(data: bytes, origin: str, invalid_utf8: str) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "skip":
            return None
        if invalid_utf8 == "replace":
            return data.decode("utf-8", "replace")
        raise ValueError(f"{origin}: not valid UTF-8 at byte {error.start}; use --invalid-utf8 skip or replace") from error
