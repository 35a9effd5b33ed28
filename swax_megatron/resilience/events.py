"""What happened to a run, over all its restarts: ``run_dir/events.jsonl``, append-only, one JSON object a line.

Every line has ``time`` (seconds since the epoch), ``event`` and ``attempt`` (1 for the first start of the run directory). Rank 0
writes; another rank writes only what ends it. A killed writer may leave half a line: the next line starts a new one, and
reading leaves the half out.

    start {host, pid, processes, job}   resume {step}   saved {step, seconds}   signal {reason, step}   end {code, step}
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "events.jsonl"
_log = logging.getLogger(__name__)


class Events:
    """Appends to the events of a run directory."""

    def __init__(self, run_dir: str | Path, attempt: int) -> None:
        self.path, self.attempt = Path(run_dir) / FILE, attempt

    @classmethod
    def of_next_attempt(cls, run_dir: str | Path) -> Events:
        """For a process that starts: one attempt more than the file tells of."""
        return cls(run_dir, 1 + sum(event["event"] == "start" for event in read_events(run_dir)))

    def write(self, event: str, **fields: Any) -> None:
        """Append one event, in one write, and fsync it. A full disk costs the event, with a warning, and not the run."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, "attempt": self.attempt, **fields}) + "\n"
        try:
            self._append(line)
        except OSError as error:
            _log.warning("%s: the event %r is not written (%s)", self.path, event, error)

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line  # what a killed writer left
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_events(run_dir: str | Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The events of a run, oldest first; none where there is no file. offset: bytes at the file's start to leave out."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event and "time" in event:
                yield event


def size(run_dir: str | Path) -> int:
    """Bytes of the events file now: what happens later lies behind it."""
    path = Path(run_dir) / FILE
    return path.stat().st_size if path.exists() else 0


def ended_with(run_dir: str | Path, offset: int = 0) -> int | None:
    """The exit code that the run's last end told, behind ``offset``; None where it was killed before it could tell.

    torchrun exits with 1 whatever its workers' code was: who starts a run through it asks here.
    """
    codes = [int(event["code"]) for event in read_events(run_dir, offset) if event["event"] == "end"]
    return codes[-1] if codes else None
