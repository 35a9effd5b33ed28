"""OUT.work: the finished segments of a run that is not complete, so that it goes on after any interruption.

A segment is written in a folder of its own and renamed when it is whole, so a folder with the segment's name is whole.
Several processes, of one machine or many, may work in it at once; whoever finishes a segment second throws its copy away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from data_prep.fetch import copy_path
from data_prep.segments import Segment, Task
from swax_megatron.data.writer import sync, write_synced

RECORD = "record.json"
PUBLISHED = "published.json"
_COMMAND = "command.json"


class WorkFolder:
    """The work folder beside ``out`` for one set of content-deciding ``options`` (JSON), of which ``command`` is the text."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.work")
        self.command = json.dumps(options, sort_keys=True)
        self.segments, self.spool, self.joined = self.path / "segments", self.path / "spool", self.path / "joined"
        self._known: dict[int, list[int]] = {}

    def open(self) -> int:
        """Create or re-enter it; returns how many segments it holds. ValueError where it belongs to another command."""
        self.segments.mkdir(parents=True, exist_ok=True)
        command = self.path / _COMMAND
        if not command.exists():
            aside = command.with_name(f"{_COMMAND}.tmp-{_owner()}")
            write_synced(aside, self.command.encode())
            os.replace(aside, command)
        if (before := command.read_text()) != self.command:
            then, now = json.loads(before), json.loads(self.command)
            changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
            raise ValueError(
                f"{self.path} holds the unfinished work of a command with other options ({', '.join(changed)}): "
                "repeat that command to finish it, or remove the folder to begin anew"
            )
        self._remove_dead()
        return self.refresh()

    def refresh(self) -> int:
        """Look what is finished by now; returns how many segments are."""
        self._known = {}
        names = [name for name in os.listdir(self.segments) if ".tmp-" not in name]
        for name in names:
            task, index, _ = name.split("-")
            self._known.setdefault(int(task), []).append(int(index))
        return len(names)

    def _remove_dead(self) -> None:
        """Remove what processes of this machine left that no longer run."""
        for folder in self.segments.glob("*.tmp-*"):
            host, _, pid = folder.name.rpartition(".tmp-")[2].rpartition("-")
            if host == _host() and not os.path.exists(f"/proc/{pid}") and os.path.isdir("/proc/self"):
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self, segment: Segment) -> Path:
        """An empty folder for a segment that this process writes."""
        folder = self.segments / f"{segment.name}.tmp-{_owner()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self, segment: Segment, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Give a written segment its name; returns its record."""
        write_synced(folder / RECORD, json.dumps(record).encode())
        sync(folder)
        try:
            os.rename(folder, self.segments / segment.name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        return record

    def folder(self, segment: Segment) -> Path:
        """Where a finished segment lies."""
        return self.segments / segment.name

    def record(self, segment: Segment) -> dict[str, Any] | None:
        """The record of a finished segment, None where it is not finished. ValueError where it is damaged."""
        path = self.folder(segment) / RECORD
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove its folder and run the command again") from error

    def finished(self, task: Task) -> tuple[list[tuple[Segment, dict[str, Any]]], list[int]]:
        """The finished segments of a task in order with their records, and the indices known to be missing.

        A task whose number of segments only reading tells has a missing one until one of its records says that it is the last.
        """
        found, missing, index = [], [], 0
        last = max(self._known.get(task.number, [-1])) + 1 if task.segments is None else task.segments
        while index < last:
            record = self.record(Segment(task, index))
            if record is None:
                missing.append(index)
            else:
                found.append((Segment(task, index), record))
                if record["end"]:
                    return found, missing
            index += 1
        return found, missing + ([last] if task.segments is None else [])

    def forget(self, task: Task) -> None:
        """Remove the local copies of a task's remote files."""
        for item in task.inputs:
            copy_path(item, self.spool).unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Remove the folder unless it holds a segment, of this or another process."""
        if not any(self.segments.iterdir()):
            self.remove()

    def remove(self) -> None:
        """Remove everything; last what says that the work is done, so that an interruption leaves no unfinished work."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == PUBLISHED):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path.rmdir()


def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def _owner() -> str:
    return f"{_host()}-{os.getpid()}"
