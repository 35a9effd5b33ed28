"""Fixtures shared by all tests: process pools and small data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.workers import Workers


class Pools:
    """pools(n): the session's pool of n processes; one that a failed test took down, or that is crowded, is started anew."""

    def __init__(self) -> None:
        self._pools: dict[int, Workers] = {}

    def __call__(self, size: int) -> Workers:
        if size in self._pools and self._pools[size].crowded:
            self.keep(*self._pools.keys() - {size})
        if size not in self._pools or not self._pools[size].alive:
            self._pools[size] = Workers(size)
        return self._pools[size]

    def keep(self, *sizes: int) -> None:
        """End the others: a process holds half a gigabyte."""
        for size in self._pools.keys() - set(sizes):
            self._pools.pop(size).close()


@pytest.fixture(scope="session")
def workers() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.keep()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training sources and a validation set of short documents with uneven loss masks (see tests/corpus.py)."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
