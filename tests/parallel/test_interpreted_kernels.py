"""Training steps whose every kernel runs in Triton's CPU interpreter (in interpreted_run.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.matrix
def test_a_run_on_the_kernels_equals_one_in_plain_torch(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.parallel.interpreted_run", str(corpus), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the runs agree" in done.stdout
