"""A folder of verified copies of remote files with a size limit, shared by all processes of a host.

A file is named by its sha256, so that every data set and run may share one folder. It is written aside, verified and renamed;
only one process downloads it, under its own lock. Room is made, under the folder's lock, by removing what was used longest ago.
A file that is open holds a shared lock and is never removed: the limit counts what really takes up the disk. The locks are
flock's, which the kernel drops with their process, so a killed process leaves nothing that has to be cleaned up by hand.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE = 60.0  # seconds to wait for an open file to be closed


class CacheError(OSError):
    """The cache cannot hold what is needed; the message says what to change."""


class FileCache:
    """folder: made where it is missing; on a disk of this host.  limit: most bytes of all files in it."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._locks = self.folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cache folder {self.folder} cannot be made ({error.strerror}): name another with data.cache") from error

    def open(self, sha256: str, size: int, fetch: Callable[[Path], None]) -> int:
        """A descriptor of the file, for reading; it stays in the cache until the descriptor is closed.

        fetch: called with a path to write the file to where it is not here; it must verify what it wrote or raise.
        Raises CacheError where the limit leaves no room, and what ``fetch`` raises.
        """
        path = self.folder / sha256
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self.bring(sha256, size, fetch)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                os.utime(descriptor)  # used now
                return descriptor
            os.close(descriptor)  # removed between opening and locking

    def bring(self, sha256: str, size: int, fetch: Callable[[Path], None], *, wait: bool = True) -> None:
        """Have the file here. Without ``wait``, leave it to another process that is already bringing it."""
        path = self.folder / sha256
        with self._locked(sha256, wait) as mine:
            if not mine or path.exists():
                return
            aside = self._reserve(sha256, size)
            try:
                fetch(aside)
                _sync(aside)
                with self._locked("folder"):  # a listing of the folder during a rename may miss the file
                    os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def bytes(self) -> int:
        """What all files take up, those being written with their full size."""
        with self._locked("folder"):
            return sum(size for _, size, _ in self._files())

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether the lock of that name was got."""
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, path) of every file; one being written is called ``<sha256>.<size>.part``."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            if entry.is_file():
                size = int(entry.name.split(".")[1]) if entry.name.endswith(".part") else stat.st_size
                files.append((stat.st_mtime, size, Path(entry.path)))
        return sorted(files)

    def _reserve(self, sha256: str, size: int) -> Path:
        """Make room for a file and claim it under the name it is written to."""
        aside = self.folder / f"{sha256}.{size}.part"
        deadline = time.monotonic() + _PATIENCE
        while True:
            with self._locked("folder"):
                files = self._files()
                used = sum(size for _, size, _ in files)
                for _, freed, path in files:
                    if used + size <= self.limit:
                        break
                    used -= freed if self._remove(path) else 0
                if used + size <= self.limit:
                    aside.touch()
                    return aside
            if size > self.limit or time.monotonic() > deadline:
                raise CacheError(
                    f"cache folder {self.folder} has no room for a file of {size} bytes: its limit is {self.limit} bytes and "
                    f"{used} are in use; raise data.cache_gib"
                )
            time.sleep(0.05)

    def _remove(self, path: Path) -> bool:
        """Remove a file that nobody has open, or what a process that died left half-written."""
        if path.suffix == ".part":
            with self._locked(path.name.split(".")[0], wait=False) as abandoned:
                if abandoned:
                    path.unlink(missing_ok=True)
                return abandoned
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # removed by hand
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
