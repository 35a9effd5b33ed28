"""What the command lines of this folder share: one clear sentence for a user's error, sizes, progress."""

from __future__ import annotations

import argparse
import errno
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(command: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and run; a user's error becomes ``error: <sentence>`` on stderr and exit status 2."""
    args = parser.parse_args(argv)
    try:
        return command(args) or 0
    except (ValueError, OSError) as error:
        print("error: " + " ".join(sentence(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def sentence(error: Exception) -> str:
    """What a user is told about an error."""
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" while {error.filename} was written" if error.filename else ""
        return f"the disk is full or a limit is reached{where} ({error.strerror}): make room and run the same command again"
    return str(error)


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that cleaning up runs."""

    def stop(_signal: int, _frame: Any) -> NoReturn:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)


def size(text: str) -> int:
    """A number of bytes: 4096, 64K, 64M, 2G (powers of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    value = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes such as 4096, 64K, 64M or 2G")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """A number from 0 up to, but without, 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 up to (without) 1")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    return 1.0 if text in ("1", "1.0") else fraction(text)


class Progress:
    """A line on stderr every few seconds: share done, rate, time left.

    total: of what ``add`` counts first, such as bytes of input; None where it is not known, then no share is told.
    """

    def __init__(self, what: str, total: int | None, interval: float = 5.0) -> None:
        self._what, self._total, self._interval = what, total, interval
        self._start = self._last = time.monotonic()
        self._done = self._text = self._documents = 0

    def add(self, done: int, text_bytes: int, documents: int) -> None:
        """Count what was read from disk, the text in it and its documents."""
        self._done, self._text, self._documents = self._done + done, self._text + text_bytes, self._documents + documents
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            if self._total is None:
                self._print(f"{now - self._start:.0f} s")
                return
            share = min(1.0, self._done / max(1, self._total))
            left = (now - self._start) * (1 - share) / share if share else float("nan")
            self._print(f"{100 * share:5.1f} %, {left:.0f} s left")

    def finish(self, remark: str = "") -> None:
        """The last line, with the rates of the whole."""
        self._print(f"done in {time.monotonic() - self._start:.1f} s" + (f", {remark}" if remark else ""))

    def _print(self, state: str) -> None:
        seconds = max(1e-9, time.monotonic() - self._start)
        rate = f"; {self._text / 1e6:.1f} MB of text at {self._text / 1e6 / seconds:.2f} MB/s" if self._text else ""
        documents = f"; {self._documents} documents at {self._documents / seconds:.0f}/s" if self._documents else ""
        print(f"{self._what}: {state}{rate}{documents}", file=sys.stderr, flush=True)
