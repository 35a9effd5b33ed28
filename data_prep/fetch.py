"""Bringing remote inputs here, one file at a time, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from data_prep.inputs import Input

TRIES = 4


def copy_path(item: Input, folder: Path) -> Path:
    """Where the copy of a remote input lies; another place where the input has got another size."""
    return folder / hashlib.blake2b(f"{item.bytes} {item.path}".encode(), digest_size=12).hexdigest()


def local_copy(item: Input, folder: Path) -> Path:
    """The file of a remote input inside ``folder``, fetched unless it is there already.

    Several processes may fetch the same one: each writes aside and renames. ValueError after ``TRIES`` failures.
    """
    path = copy_path(item, folder)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")  # the folder may be shared by hosts
    for attempt in range(1, TRIES + 1):
        try:
            _pipe(item.path.removeprefix("pipe:"), aside) if item.path.startswith("pipe:") else _url(item, aside)
            os.rename(aside, path)
            return path
        except (OSError, ValueError) as error:
            aside.unlink(missing_ok=True)
            reason = " ".join(str(error).split())
            if attempt == TRIES:
                raise ValueError(f"input {item.path} could not be read in {TRIES} tries: {reason}") from error
            print(f"input {item.path}: {reason}; try {attempt + 1} of {TRIES} follows", file=sys.stderr, flush=True)
            time.sleep(2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _url(item: Input, aside: Path) -> None:
    import fsspec

    with fsspec.open(item.path, "rb", compression=None) as file, open(aside, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 22)
    if item.bytes is not None and aside.stat().st_size != item.bytes:
        raise ValueError(f"{aside.stat().st_size} bytes came where {item.bytes} were announced")


def _pipe(command: str, aside: Path) -> None:
    with open(aside, "wb") as copy:
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], stdin=subprocess.DEVNULL, stdout=copy)
    if done.returncode:
        raise ValueError(f"the command exits with status {done.returncode}")
