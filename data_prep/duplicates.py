"""Exact duplicates over a whole corpus, in bounded memory: fingerprints partitioned on disk, each partition sorted alone.

Of equal documents the first in the corpus's order stays. Documents are equal where the 128-bit BLAKE2b hashes of their
text are (among 10^10 different documents the chance of a single false match is below 10^-18).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

FINGERPRINTS = "fingerprints.bin"
FINGERPRINT = np.dtype([("high", "<u8"), ("low", "<u8"), ("bytes", "<u8")])
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8")])
_MOST_PARTITIONS = 512
_SORTING = 4  # the memory that sorting takes, in sizes of what is sorted


def document_fingerprints(texts: Sequence[bytes]) -> np.ndarray:
    """Hash and length in bytes of each text: (D,) of ``FINGERPRINT``."""
    found = np.empty(len(texts), FINGERPRINT)
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
    found["high"], found["low"] = halves[:, 0], halves[:, 1]
    found["bytes"] = np.fromiter(map(len, texts), np.uint64, len(texts))
    return found


def find_duplicates(
    pieces: Sequence[Path], folder: Path, memory: int = 512 << 20, report: Callable[[int], None] = lambda documents: None
) -> None:
    """Write for piece i the numbers of its documents that occurred before to ``folder``/i, where there are any.

    pieces: files of ``FINGERPRINT``, in the corpus's order.  folder: is emptied first.  memory: bytes to use, about.
    report: called with the number of documents of each part of the work when it is done; every document counts twice.
    Raises OSError, which names a file or the folder, where the disk is full.
    """
    try:
        _find(pieces, folder, memory, report)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(folder)) from error


def _find(pieces: Sequence[Path], folder: Path, memory: int, report: Callable[[int], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    counts = np.array([path.stat().st_size // FINGERPRINT.itemsize for path in pieces], np.int64)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    needed = int(firsts[-1]) * _ENTRY.itemsize * _SORTING
    bits = min((max(1, needed // memory)).bit_length(), _MOST_PARTITIONS.bit_length() - 1)
    _partition(pieces, firsts, folder, bits, report)
    for partition in range(1 << bits):
        path = _partition_path(folder, partition)
        entries = np.fromfile(path, _ENTRY)
        count = len(entries)
        order = np.lexsort((entries["place"], entries["low"], entries["high"]))
        high, low = entries["high"][order], entries["low"][order]
        again = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1])) + 1
        places = np.sort(entries["place"][order][again].astype(np.int64))
        del entries, order, high, low
        path.unlink()
        owners = np.searchsorted(firsts, places, side="right") - 1
        for piece in np.unique(owners):
            with open(folder / str(piece), "ab") as file:
                file.write((places[owners == piece] - firsts[piece]).astype("<i8").tobytes())  # tofile's errors say no reason
        report(count)


def _partition_path(folder: Path, partition: int) -> Path:
    return folder / f"partition-{partition:03d}"


def _partition(pieces: Sequence[Path], firsts: np.ndarray, folder: Path, bits: int, report: Callable[[int], None]) -> None:
    """Spread the fingerprints, with their places in the corpus, over 2^bits files by their first bits."""
    with ExitStack() as stack:
        files = [stack.enter_context(open(_partition_path(folder, partition), "wb")) for partition in range(1 << bits)]
        for path, first in zip(pieces, firsts, strict=False):
            found = np.fromfile(path, FINGERPRINT)
            entries = np.empty(len(found), _ENTRY)
            entries["high"], entries["low"] = found["high"], found["low"]
            entries["place"] = np.arange(first, first + len(found), dtype=np.uint64)
            owner = (found["high"] >> np.uint64(64 - bits)).astype(np.int64)
            order = np.argsort(owner, kind="stable")
            bounds = np.searchsorted(owner[order], np.arange((1 << bits) + 1))
            for partition in range(1 << bits):
                files[partition].write(entries[order[bounds[partition] : bounds[partition + 1]]].tobytes())
            report(len(found))
