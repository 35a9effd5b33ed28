"""What a corpus is made of: sources (with what is known about each), their files, and the kind of each file.

A path is a local file or folder, an fsspec URL (``s3://bucket/folder/``, ``https://host/file.jsonl.gz``), or ``pipe:COMMAND``,
whose standard output is the file. The order of files is fixed: sources and paths as given, folders walked in sorted order.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DEFAULT_GLOB = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "*.txt", "*.wet", "*.wet.gz")
KINDS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "wet": (".wet", ".wet.gz"),
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z", ".warc")
_PIPE = "pipe:"


@dataclass(frozen=True)
class Source:
    """One source of documents: where it lies, which files count, the text's key, and what the user says about it."""

    name: str
    paths: tuple[str, ...]
    globs: tuple[str, ...] = DEFAULT_GLOB
    text_key: str = "text"
    kind: str = "auto"  # auto | jsonl | parquet | wet | text
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """One file of a corpus; ``bytes`` is None where it is not known before it is read (pipes)."""

    path: str
    kind: str  # jsonl | parquet | wet | text
    bytes: int | None
    changed: int = 0  # nanoseconds since 1970 of a local file: one that was replaced is read again
    remote: bool = False


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a pipe."""
    return path.startswith(_PIPE) or "://" in path


def read_sources(path: str | Path) -> list[Source]:
    """The sources that a YAML file lists; ValueError naming the file and the field where it is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--sources {path} cannot be read: {error}") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"--sources {path} must be a list of entries such as {{name: code, input: [src/], glob: ['*.py'], license: MIT}}")
    sources = [_source(path, entry) for entry in content]
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--sources {path}: the name {min(twice)!r} stands twice; give each source its own")
    return sources


def _source(path: str | Path, entry: dict[str, Any]) -> Source:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"--sources {path}: an entry has no name; write one such as name: code")

    def strings(key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = entry.get(key, list(default))
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise ValueError(f"--sources {path}: {key} of {name!r} must be a list of strings")
        return tuple(value)

    kind = entry.get("format", "auto")
    if kind not in ("auto", "text", *KINDS):
        raise ValueError(f"--sources {path}: format of {name!r} is {kind!r}; it must be auto, text, {', '.join(KINDS)}")
    known = ("name", "input", "glob", "text_key", "format")
    notes = {str(key): value for key, value in entry.items() if key not in known}
    return Source(name, strings("input", ()), strings("glob", DEFAULT_GLOB), str(entry.get("text_key", "text")), kind, notes)


def list_inputs(source: Source) -> list[Input]:
    """Every file of a source in its fixed order.

    Files inside folders must match one of the globs; links to folders are not followed. ValueError if a path does not
    exist, is of an unknown compressed kind, or if nothing is found.
    """
    inputs: list[Input] = []
    for path in source.paths:
        if path.startswith(_PIPE):
            inputs.append(Input(path, "jsonl" if source.kind == "auto" else source.kind, None, remote=True))
        elif "://" in path:
            inputs += _list_remote(path, source)
        elif os.path.isdir(path):
            for folder, folders, files in os.walk(path):
                folders.sort()
                inputs += [_local(os.path.join(folder, name), source) for name in sorted(files) if _matches(name, source.globs)]
        elif os.path.isfile(path):
            inputs.append(_local(path, source))
        else:
            raise ValueError(f"input {path} does not exist")
    if not inputs:
        raise ValueError(f"no file in {', '.join(source.paths)} matches {' '.join(source.globs)}; choose others with --glob")
    return inputs


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _local(path: str, source: Source) -> Input:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"input {path} cannot be read: {error.strerror}") from error
    return Input(path, _kind(path, source), stat.st_size, stat.st_mtime_ns)


def _kind(path: str, source: Source) -> str:
    if source.kind != "auto":
        return source.kind
    name = os.path.basename(path.split("?")[0]).lower()
    for kind, endings in KINDS.items():
        if name.endswith(endings):
            return kind
    if name.endswith(_COMPRESSED):
        raise ValueError(f"input {path} is of no known kind; known are {' '.join(DEFAULT_GLOB)} and plain UTF-8 text, or name its --format")
    return "text"


def _list_remote(url: str, source: Source) -> list[Input]:
    """A URL that ends in / is a folder, any other a file."""
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(f"input {url} needs fsspec, and the package for this kind of URL: pip install fsspec") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
        if not url.endswith("/"):
            size = system.info(path).get("size")
            return [Input(url, _kind(url, source), size, remote=True)]
        found = system.find(path, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"input {url} cannot be read: {error}") from error
    inputs = []
    for name in sorted(found):
        if _matches(name.rsplit("/", 1)[-1], source.globs):
            inputs.append(Input(system.unstrip_protocol(name), _kind(name, source), found[name].get("size"), remote=True))
    return inputs
