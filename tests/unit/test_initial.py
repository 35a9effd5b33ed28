"""Initial weights drawn by threads, slice by slice, are those of one draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swax_megatron import randomness
from swax_megatron.model import initial


@pytest.mark.parametrize("cores", [1, 4])
def test_slices_and_threads_do_not_change_the_values(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "_SLICE", 1000)
    monkeypatch.setattr(initial.os, "sched_getaffinity", lambda _: set(range(cores)))
    rows, columns = 70, 90
    block = torch.full((30, 40), torch.nan)
    initial.fill(block, initial.Initial("normal", 0.5), "a.weight", 3, (rows, columns), (20, 50))
    whole = randomness.normal(0, rows * columns, "weight:a.weight", 3).reshape(rows, columns) * np.float32(0.5)
    assert (block.numpy() == whole[20:50, 50:]).all()
