"""One process on one GPU: what every layout is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import runs
from tests.gpu.layouts import settings


@pytest.fixture(scope="module")
def alone(workers: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, list[float]]]:
    """alone(precision): the metrics of a run of one process."""
    made: dict[str, dict[str, list[float]]] = {}

    def get(precision: str) -> dict[str, list[float]]:
        if precision not in made:
            made[precision] = workers(1).run(runs.train, settings(corpus, tmp_path_factory.mktemp("alone"), precision))[0]
        return made[precision]

    return get
