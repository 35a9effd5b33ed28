"""Fixtures shared by all tests: process pools and small data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """workers(n): the session's pool of n processes; a pool that a failed test took down is started anew."""
    pools: dict[int, Workers] = {}

    def pool(size: int) -> Workers:
        if size not in pools or not pools[size].alive:
            pools[size] = Workers(size)
        return pools[size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training sources and a validation set of short documents with uneven loss masks (see tests/corpus.py)."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
