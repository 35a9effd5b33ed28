"""A Slurm of these tests' own, started when the first test asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import NODES, Cluster

SCRIPT = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes on this machine: two for jobs, one to spare. Skips, with the script's reason, where that is impossible."""
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([SCRIPT, "up", folder, str(NODES)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    yield Cluster(folder)
    subprocess.run([SCRIPT, "down", folder], check=True)


@pytest.fixture
def cluster(started: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster with all its nodes up and idle, and an environment that speaks to it and to no other Slurm."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SWAX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(started.folder / "slurm.conf"))
    monkeypatch.setenv("SWAX_SCRATCH", "/tmp")
    monkeypatch.setenv("SWAX_PYTHON", sys.executable)
    yield started
    started.clear()
