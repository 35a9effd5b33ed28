"""Where the files of a data set come from: a folder, an object store or HTTP through fsspec, or a command.

* ``/data/web`` and other plain paths are read in place.
* ``s3://bucket/web``, ``https://host/web``, ``file:///net/web`` and every other URL that fsspec opens (s3 needs ``s3fs``, gs ``gcsfs``).
* ``pipe:aws s3 cp s3://bucket/web/{file} -``: a shell command that writes the file named ``{file}`` to its standard output.

Files of the last two kinds are fetched with retries into a ``FileCache``, verified against the manifest, and read from there. Files
are read with ``pread``, not mapped: an error of the disk or the network is then an error in words and not a killed process, and the
memory of a process does not grow with what it has read.
A URL or a command comes from the user's own configuration; a manifest may only name files inside its data set.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from swax_megatron.data.cache import CacheError, FileCache

_log = logging.getLogger(__name__)
_COMMAND_SECONDS = 3600  # after which a command is taken for hung
_LONGEST_PAUSE = 30.0
_DOWNLOADS = 4  # files fetched ahead at once


class RemoteError(OSError):
    """A file could not be fetched; the message names it and says how often it was tried."""


def is_remote(path: str) -> bool:
    """Whether a data set's path is a URL or a command rather than a folder."""
    return path.startswith("pipe:") or "://" in path


def read_file(path: str | Path, name: str, retries: int = 5) -> bytes:
    """A small file of a data set, whole; OSError where it cannot be read."""
    folder = RemoteFolder(str(path), None, retries) if is_remote(str(path)) else LocalFolder(path)
    return folder.read(name)


def sha256_of(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Reader:
    """An open file, read at any position by any thread; closed when nobody refers to it any more."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self.name = descriptor, name

    def sha256(self) -> str:
        """sha256 of the file, in hexadecimal; OSError with its name where it cannot be read."""
        digest, at = hashlib.sha256(), 0
        try:
            while block := os.pread(self._descriptor, 1 << 22, at):
                digest.update(block)
                at += len(block)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from error
        return digest.hexdigest()

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fill the contiguous array ``target`` with the bytes from ``offset`` on.

        ValueError where the file ends before, OSError with its name where it cannot be read.
        """
        try:
            done = os.preadv(self._descriptor, [target], offset)
            while done < target.nbytes:
                more = os.preadv(self._descriptor, [target.view(np.uint8)[done:]], offset + done)
                if not more:
                    raise ValueError(f"{self.name} ends at byte {offset + done}, before its index says; copy the data set again")
                done += more
        except OSError as error:  # of an open file it does not say which
            raise OSError(error.errno, error.strerror, self.name) from error

    def __del__(self) -> None:
        os.close(self._descriptor)


class LocalFolder:
    """Files that are read where they lie.

    hashed: compare the sha256 of a file with the manifest's when it is opened for the first time.
    """

    remote = False

    def __init__(self, path: str | Path, hashed: bool = False) -> None:
        self.path, self.hashed = Path(path), hashed
        self._checks: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """A small file, whole; OSError where it cannot be read."""
        return (self.path / name).read_bytes()

    def open(self, name: str, size: int, sha256: str) -> Reader:
        """A file, for reading; ValueError where it is missing, or has another size or (see ``hashed``) another content."""
        path = self.path / name
        try:
            reader = Reader(os.open(path, os.O_RDONLY), str(path))
        except FileNotFoundError:
            raise ValueError(f"shard file {path} is missing; copy the data set again") from None
        if (found := path.stat().st_size) != size:
            raise ValueError(f"{path} has {found} bytes where the manifest states {size}; copy the data set again")
        if self.hashed:
            self._check(reader, name, sha256)
        return reader

    def _check(self, reader: Reader, name: str, sha256: str) -> None:
        """Hash a file once; whoever comes in the meantime waits for the outcome."""
        with self._lock:
            mine = name not in self._checks
            check = self._checks.setdefault(name, Future())
        if mine:
            try:
                if reader.sha256() != sha256:
                    raise ValueError(f"{reader.name} is damaged: its sha256 is not the manifest's; copy the data set again")
                check.set_result(None)
            except (OSError, ValueError) as error:
                check.set_exception(error)
        check.result()

    def fetch_ahead(self, files: Iterable[tuple[str, int, str]]) -> None:
        """Nothing to do: the operating system reads ahead."""


class RemoteFolder:
    """Files behind a URL or a command, kept in a cache.

    cache: None serves only ``read``.  retries: how often a failed fetch is tried again, after 0.5, 1, 2, ... seconds (at most 30).
    """

    remote = True

    def __init__(self, url: str, cache: FileCache | None, retries: int = 5, pause: float = 0.5) -> None:
        self.url, self.cache, self.retries, self._pause = url.rstrip("/"), cache, retries, pause
        self.retried = 0
        self._get, self._missing = _command(url) if url.startswith("pipe:") else _file_system(self.url)
        self._ahead: ThreadPoolExecutor | None = None
        self._wanted: set[str] = set()
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """A small file, whole and fresh, past the cache; RemoteError where it cannot be read."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            self._try(name, lambda: self._get(name, target))
            return target.read_bytes()

    def open(self, name: str, size: int, sha256: str) -> Reader:
        """A file, for reading, verified; it cannot leave the cache before the reader is dropped.

        Raises RemoteError where it cannot be fetched, ValueError where it is damaged at its origin, CacheError without room.
        """
        return Reader(self.cache.open(sha256, size, lambda target: self._fetch(name, size, sha256, target)), f"{self.url}/{name}")

    def fetch_ahead(self, files: Iterable[tuple[str, int, str]]) -> None:
        """Begin to fetch (name, size, sha256) in the background. A failure is left to whoever then maps the file."""
        with self._lock:
            self._ahead = self._ahead or ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="fetch")
            for name, size, sha256 in files:
                if name not in self._wanted:
                    self._wanted.add(name)
                    self._ahead.submit(self._bring, name, size, sha256)

    def _bring(self, name: str, size: int, sha256: str) -> None:
        try:
            self.cache.bring(sha256, size, lambda target: self._fetch(name, size, sha256, target), wait=False)
        except (OSError, ValueError) as error:
            _log.warning("fetching ahead: %s", error)
        finally:
            with self._lock:
                self._wanted.discard(name)

    def _fetch(self, name: str, size: int, sha256: str, target: Path) -> None:
        def once() -> None:
            self._get(name, target)
            found = target.stat().st_size
            if found != size:
                raise ValueError(f"{self.url}/{name} gave {found} bytes where the manifest states {size}")
            if sha256_of(target) != sha256:
                raise ValueError(f"{self.url}/{name} is damaged: its sha256 is not the manifest's")

        self._try(name, once)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        for attempt in range(self.retries + 1):
            try:
                return action()
            except self._missing as error:
                raise RemoteError(f"{self.url}/{name} does not exist ({error}); copy the data set again") from error
            except CacheError:
                raise
            except Exception as error:  # the file systems behind fsspec raise errors of their own kinds
                _refuse_full_disk(error)
                if attempt == self.retries:
                    kind = ValueError if isinstance(error, ValueError) else RemoteError
                    tries = f"{attempt + 1} tries" if attempt else "one try"
                    raise kind(f"{self.url}/{name} cannot be read after {tries}: {error or type(error).__name__}") from error
                self.retried += 1
                _log.warning("%s/%s: %s: %s; trying again", self.url, name, type(error).__name__, error)
                time.sleep(min(_LONGEST_PAUSE, self._pause * 2**attempt))
        raise AssertionError("the last attempt returns or raises")


def _refuse_full_disk(error: Exception) -> None:
    """A full disk here is no fault of the remote's, and no further try mends it: CacheError."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise CacheError(
            f"the disk that fetched files are written to is full or a limit is reached ({error}): make room, lower data.cache_gib, "
            "or name another data.cache"
        ) from error


def _file_system(url: str) -> tuple[Callable[[str, Path], None], Any]:
    """get(name, target) of a URL, and the errors that mean that there is no such file."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be opened ({error}): install the package for it, or use a path, https:// or pipe:") from error

    def get(name: str, target: Path) -> None:
        system.get_file(f"{root}/{name}", str(target))

    return get, FileNotFoundError


def _command(url: str) -> tuple[Callable[[str, Path], None], Any]:
    """get(name, target) of a command. Its errors cannot be told apart, so none means that there is no such file."""
    template = url.removeprefix("pipe:").strip()
    if "{file}" not in template:
        raise ValueError(f"{url!r}: the command must hold {{file}} for a file's name, e.g. pipe:curl -sSf https://host/web/{{file}}")

    def get(name: str, target: Path) -> None:
        command = template.replace("{file}", shlex.quote(name))
        with open(target, "wb") as file:
            try:
                done = subprocess.run(
                    ["bash", "-o", "pipefail", "-c", command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.PIPE,
                    timeout=_COMMAND_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise RemoteError(f"{command!r} ran for more than {_COMMAND_SECONDS} s") from None
        if done.returncode:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            if os.strerror(errno.ENOSPC) in last:
                raise OSError(errno.ENOSPC, last)
            raise RemoteError(f"{command!r} ended with status {done.returncode}: {last}")

    return get, ()
