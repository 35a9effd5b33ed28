"""A data set, opened for random access: manifest.json, tar shards, an index beside each tar, tokenizer.model.

Nothing is extracted and nothing is looked up by a tar member's name: the index gives byte offsets. Opening reads the manifest and
64 bytes of each index; document tables are read when a shard is used. Of a remote data set, opening reads the manifest and the
tokenizer; shards are fetched into a cache when they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from swax_megatron.data.cache import FileCache
from swax_megatron.data.index import ShardIndex, parse_index, read_header
from swax_megatron.data.storage import LocalFolder, Reader, RemoteFolder, is_remote, sha256_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_ENTRY = ("file", "sha256", "bytes", "documents", "tokens", "index", "index_sha256", "index_bytes")
_CHECKS_AT_ONCE = 8  # network file systems answer slowly, and many at once

fingerprint = sha256_of


class ShardedDataset:
    """A data set written by data_prep/shard.py. Safe for several threads.

    path: the folder that holds manifest.json; or a URL or ``pipe:`` command, as ``swax_megatron.data.storage`` says.
    verify: "size" compares the size of every file with the manifest and every index header with its shard; "use" does so, and
        hashes a file when it is opened for the first time to be read; "sha256" hashes every file now (minutes for a large corpus:
        do it once a node, not once a rank). Files of a remote data set are hashed when they are fetched, always.
    max_open_shards: tars kept open at once, a file descriptor each.
    cache, retries: where files of a remote data set are kept (needed for one), and how often a failed fetch is tried again.
    damaged: "stop" raises ValueError for the first damaged or missing shard; "skip" leaves such shards out, and ``skipped``
        maps their files' names to what is wrong. Decided here, once: the order of the data depends on it.
    skip: files (tars) to leave out without looking at them, because the run left them out before; or a mapping of them to the reason.

    Raises ValueError where the data set is incomplete, damaged, or newer than this program.
    """

    def __init__(
        self,
        path: str | Path,
        verify: str = "use",
        max_open_shards: int = 128,
        *,
        cache: FileCache | None = None,
        retries: int = 5,
        damaged: str = "stop",
        skip: Collection[str] = (),
    ) -> None:
        if verify not in ("size", "use", "sha256"):
            raise ValueError(f"verify={verify!r}: must be 'size', 'use' or 'sha256'")
        if damaged not in ("stop", "skip"):
            raise ValueError(f"damaged={damaged!r}: must be 'stop' or 'skip'")
        self.storage = self._open_storage(str(path), verify == "use", cache, retries)
        self.path = path if self.storage.remote else Path(path)
        if damaged == "skip" and self.storage.remote:
            raise ValueError(
                f"damaged='skip' with the remote data set {path}: which shards are damaged must be known before the first is read; "
                "name damaged ones in the source's skip_shards, copy the data set to a disk, or keep damaged='stop'"
            )
        self.manifest, self.fingerprint = _read_manifest(self.storage, str(path))
        self.skipped: dict[str, str] = {}
        try:
            self._read_fields()
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._name(MANIFEST)} lacks or misstates {error}; write the data set again") from error
        self._max_open = 0 if self.storage.remote else max(1, max_open_shards)  # an open file cannot leave the cache
        self._open: OrderedDict[int, Reader] = OrderedDict()
        self._last_index: tuple[int, ShardIndex | None] = (-1, None)
        self._lock = threading.Lock()
        self._check_tokenizer_file()
        if unknown := sorted(set(skip) - {entry["file"] for entry in self.shards}):
            raise ValueError(f"{self._name(MANIFEST)} lists no shard {unknown[0]}, which was to be skipped")
        found = dict(skip) if isinstance(skip, Mapping) else {name: "left out by the run before" for name in skip}
        if not self.storage.remote:
            found |= self._faults(verify, damaged == "stop", set(skip))
        self._leave_out(found)

    @staticmethod
    def _open_storage(path: str, hashed: bool, cache: FileCache | None, retries: int) -> LocalFolder | RemoteFolder:
        if not is_remote(path):
            return LocalFolder(path, hashed)
        if cache is None:
            raise ValueError(f"the remote data set {path} needs a cache folder: set data.cache")
        return RemoteFolder(path, cache, retries)

    def _name(self, file: str) -> str:
        """How messages call one of the data set's files."""
        return f"{self.storage.url}/{file}" if self.storage.remote else str(Path(self.path) / file)

    def _read_fields(self) -> None:
        manifest, tokenizer = self.manifest, self.manifest["tokenizer"]
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"{self._name(MANIFEST)} has dtype={manifest['dtype']!r}: ids are stored as uint16 or uint32")
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.has_mask: bool = bool(manifest["loss_mask"])
        self.vocab_size, self.eos_id = int(tokenizer["vocab_size"]), int(tokenizer["eos_id"])
        self.tokenizer_sha256 = str(tokenizer["sha256"])
        self._tokenizer_file = self._inside(tokenizer["file"])
        self.shards: list[dict[str, Any]] = manifest["shards"]
        for entry in self.shards:
            if missing := [key for key in _ENTRY if key not in entry]:
                raise KeyError(missing[0])
            self._inside(entry["file"])
            self._inside(entry["index"])
        self.text_bytes = int(manifest["totals"]["text_bytes"])
        if not self.shards:
            raise ValueError(f"{self._name(MANIFEST)} lists no shard; write the data set again with data_prep/shard.py")

    def _inside(self, name: str) -> str:
        """A file of this data set; a manifest may not point elsewhere."""
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{self._name(MANIFEST)} names the file {name!r}: only plain names inside the data set folder are allowed")
        return name

    def _leave_out(self, found: dict[str, str]) -> None:
        """Go on without some shards."""
        self.skipped |= found
        self.shards = [entry for entry in self.shards if entry["file"] not in self.skipped]
        if not self.shards:
            name, reason = next(iter(self.skipped.items()))
            raise ValueError(f"every shard of {self.path} is damaged ({name}: {reason}); copy the data set again")
        self.shard_documents = np.array([entry["documents"] for entry in self.shards], np.int64)
        self.shard_tokens = np.array([entry["tokens"] for entry in self.shards], np.int64)
        self.documents, self.tokens = int(self.shard_documents.sum()), int(self.shard_tokens.sum())
        self._open.clear()
        self._last_index = (-1, None)

    def without(self, names: Collection[str]) -> ShardedDataset:
        """The same data set with these shards left out as well, and no other ones."""
        if self.storage.remote:
            return ShardedDataset(self.path, cache=self.storage.cache, retries=self.storage.retries, skip=names)
        return ShardedDataset(self.path, "use" if self.storage.hashed else "size", self._max_open, skip=names)

    @property
    def files(self) -> list[tuple[Path, Path]]:
        """The tar and the index of each shard of a local data set."""
        return [(Path(self.path) / entry["file"], Path(self.path) / entry["index"]) for entry in self.shards]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer of a local data set."""
        return Path(self.path) / self._tokenizer_file

    def read_tokenizer(self) -> bytes:
        """The tokenizer's file."""
        return self.storage.read(self._tokenizer_file)

    def _check_tokenizer_file(self) -> None:
        try:
            whole = hashlib.sha256(self.read_tokenizer()).hexdigest() == self.tokenizer_sha256
        except FileNotFoundError:
            whole = False
        if not whole:
            name = self._name(self._tokenizer_file)
            raise ValueError(f"{name} is missing or is not the tokenizer that wrote this data set; copy the data set again")

    def _faults(self, verify: str, stop: bool, skip: set[str]) -> dict[str, str]:
        """What is wrong with which tar; with ``stop``, the first fault is raised."""
        faults: dict[str, str] = {}
        with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
            entries = [entry for entry in self.shards if entry["file"] not in skip]
            for entry, fault in zip(entries, pool.map(lambda entry: self._fault(entry, verify), entries), strict=True):
                if fault and stop:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(fault)
                if fault:
                    faults[entry["file"]] = fault
        return faults

    def _fault(self, entry: dict[str, Any], verify: str) -> str | None:
        """What is wrong with the two files of a shard, as a sentence."""
        tar, index = os.path.join(self.path, entry["file"]), os.path.join(self.path, entry["index"])
        try:
            size = os.stat(tar).st_size
        except FileNotFoundError:
            return f"shard file {tar} is missing; copy the data set again"
        except OSError as error:
            return f"{tar} cannot be read ({error.strerror}); copy the data set again"
        if size != entry["bytes"]:
            return f"{tar} has {size} bytes where the manifest states {entry['bytes']}; copy the data set again"
        try:
            header = read_header(index, entry["index_bytes"])
        except ValueError as error:
            return str(error)
        stated = (entry["documents"], entry["tokens"], entry["bytes"], self.dtype.itemsize, self.has_mask)
        if (header.documents, header.tokens, header.tar_bytes, header.item_size, header.has_mask) != stated:
            return f"index {index} does not belong to {entry['file']} as the manifest states it; copy the data set again"
        if verify == "sha256":
            for file, digest in ((tar, entry["sha256"]), (index, entry["index_sha256"])):
                try:
                    damaged = sha256_of(file) != digest
                except OSError as error:
                    return f"{file} cannot be read ({error.strerror}); copy the data set again"
                if damaged:
                    return f"{file} is damaged: its sha256 is not the manifest's; copy the data set again"
        return None

    def check_tokenizer(self, sha256: str | None = None, vocab_size: int | None = None) -> None:
        """Refuse a tokenizer other than the data set's: ValueError if the fingerprint or the vocabulary differs."""
        if sha256 is not None and sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"data set {self.path} was written with the tokenizer {self.tokenizer_sha256[:12]}, not {sha256[:12]}: "
                "shard it again or use the tokenizer.model beside it"
            )
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(f"data set {self.path} has {self.vocab_size} ids, not {vocab_size}: set vocab_size={self.vocab_size}")

    def tar(self, number: int) -> Reader:
        """The tar of shard ``number``, open; the least recently used one is closed when too many are."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        entry = self.shards[number]
        opened = self.storage.open(entry["file"], entry["bytes"], entry["sha256"])  # outside the lock: it may take a download
        if self._max_open:
            with self._lock:
                self._open[number] = opened
                if len(self._open) > self._max_open:
                    self._open.popitem(last=False)
        return opened

    def index(self, number: int) -> ShardIndex:
        """The index of a shard, checked; the one used last is kept."""
        last, index = self._last_index
        if last != number or index is None:
            entry = self.shards[number]
            raw = np.empty(entry["index_bytes"], np.uint8)
            self.storage.open(entry["index"], entry["index_bytes"], entry["index_sha256"]).read_into(0, raw)
            index = parse_index(raw, self._name(entry["index"]))
            self._last_index = (number, index)
        return index

    def fetch_ahead(self, numbers: Iterable[int], indices_only: bool = False) -> None:
        """Begin to fetch shards of a remote data set in the background."""
        if not self.storage.remote:
            return
        for entry in (self.shards[number] for number in numbers):
            files = [(entry["index"], entry["index_bytes"], entry["index_sha256"])]
            files += [] if indices_only else [(entry["file"], entry["bytes"], entry["sha256"])]
            self.storage.fetch_ahead(files)

    def document(self, shard: int, number: int) -> np.ndarray:
        """The ids of one document with its EOS: (length,) of the stored type."""
        index = self.index(shard)
        ids = np.empty(int(index.lengths[number]), self.dtype)
        self.tar(shard).read_into(int(index.document_offsets(0, self.dtype.itemsize)[number]) * self.dtype.itemsize, ids)
        return ids

    def document_mask(self, shard: int, number: int) -> np.ndarray:
        """The loss mask of one document: (length,) bool, all true where the data set has none."""
        index = self.index(shard)
        mask = np.ones(int(index.lengths[number]), np.uint8)
        if self.has_mask:
            self.tar(shard).read_into(int(index.document_offsets(3, 1)[number]), mask)
        return mask != 0

    def blocks(self, shard: int) -> Iterator[np.ndarray]:
        """The ids of a shard in stored order, one member at a time."""
        tar, index = self.tar(shard), self.index(shard)
        tokens = np.diff(np.append(index.members[:, 1], index.header.tokens))
        for offset, length in zip(index.members[:, 0].tolist(), tokens.tolist(), strict=True):
            ids = np.empty(length, self.dtype)
            tar.read_into(offset, ids)
            yield ids


def _read_manifest(storage: LocalFolder | RemoteFolder, path: str) -> tuple[dict[str, Any], str]:
    """The manifest and the sha256 of its bytes, which names the data set."""
    try:
        raw = storage.read(MANIFEST)
    except OSError as error:
        if storage.remote:
            raise ValueError(f"no data set at {path}: {error}") from error
        folder = Path(path)
        inner = sorted(child.name for child in folder.iterdir() if (child / MANIFEST).is_file()) if folder.is_dir() else []
        hint = f"it holds the data sets {', '.join(inner)}: give {folder / inner[0]}" if inner else "write one with data_prep/shard.py"
        raise ValueError(f"no data set in {folder} ({MANIFEST}: {error.strerror}); {hint}") from error
    where = f"{path}/{MANIFEST}"
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); copy the data set again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{where} is not the manifest of a data set: it has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(f"{where} has format_version {version}, newer than this program's {FORMAT_VERSION}: update swax_megatron")
    return manifest, hashlib.sha256(raw).hexdigest()
