"""Ranks that meet through files instead of collectives.

A save in the background must not use process groups: the training thread may be inside a collective of the same group. So the
ranks post JSON files into a folder that all of them see, under the names that ``checkpoint.ranks.Ranks`` would exchange.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from swax_megatron.errors import RunError

_FASTEST, _SLOWEST = 0.002, 0.25  # seconds between two looks at the folder


class Mail:
    """The interface of ``Ranks`` (broadcast, gather, all_gather) over a folder. Values are JSON: tuples arrive as lists.

    folder: an empty one that rank 0 made; every rank makes the same calls in the same order
    timeout: seconds to wait for another rank's file; RunError after that
    """

    def __init__(self, folder: Path, rank: int, size: int, timeout: float) -> None:
        self.folder, self.rank, self.size, self.timeout = folder, rank, size, timeout
        self._turn = 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        self._turn += 1
        if self.rank == 0:
            self._post("all", value)
            return value
        return self._await("all", 0)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, None elsewhere."""
        self._turn += 1
        if self.rank:
            self._post(str(self.rank), value)
            return None
        return [value] + [self._await(str(rank), rank) for rank in range(1, self.size)]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        return self.broadcast(self.gather(value))

    def _path(self, name: str) -> Path:
        return self.folder / f"{self._turn}.{name}.json"

    def _post(self, name: str, value: Any) -> None:
        if self.size == 1:
            return
        path = self._path(name)
        aside = path.with_suffix(".tmp")
        try:
            with open(aside, "x", encoding="utf-8") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())  # on a network file system the name may otherwise be seen before the content
            aside.rename(path)
        except OSError as error:
            raise RunError(f"rank {self.rank} cannot write {path} ({error.strerror or error})") from error

    def _await(self, name: str, sender: int) -> Any:
        path, pause = self._path(name), _FASTEST
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return json.loads(path.read_bytes())
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"rank {self.rank} saw no word of rank {sender} in {self.folder} within {self.timeout:.0f} s: run_dir must lie on "
                        "a file system that all nodes share, and train.distributed_timeout exceed the time of a save"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST)
