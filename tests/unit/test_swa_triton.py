"""The Triton kernels of kernels/swa in Triton's CPU interpreter (the cases are in triton_cases.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_interpreted_kernels_match_the_reference() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.unit.triton_cases", "swa"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all cases agree" in done.stdout
