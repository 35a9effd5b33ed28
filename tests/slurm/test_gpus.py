"""Fake GPUs (links to /dev/null) of a real Slurm: an exclusive job that names none gets the whole node's, in its steps too."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPT
from tests.slurm.jobs import ROOT, slurm

JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive --mem=0
home=$SWAX_HOME
. "$home/slurm/common.sh"
load_site
load_job
on_every_node bash -c 'echo "node $SLURM_NODEID: $CUDA_VISIBLE_DEVICES"'
"""


def test_steps_of_an_exclusive_job_have_the_node_s_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "CLUSTER_GPUS": "4", "CLUSTER_PORT": "17200"}
    done = subprocess.run([SCRIPT, "up", tmp_path / "slurm", "2"], env=environment, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    try:
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
        monkeypatch.setenv("SWAX_HOME", str(ROOT))
        (tmp_path / "job.sh").write_text(JOB)
        job = slurm("sbatch", "--parsable", f"--output={tmp_path / 'out'}", str(tmp_path / "job.sh"))
        deadline = time.monotonic() + 60
        while slurm("squeue", "-h", "-j", job) and time.monotonic() < deadline:
            time.sleep(0.2)
        lines = (tmp_path / "out").read_text().splitlines()
        assert sorted(line for line in lines if line.startswith("node")) == ["node 0: 0,1,2,3", "node 1: 0,1,2,3"], lines
    finally:
        subprocess.run([SCRIPT, "down", tmp_path / "slurm"], check=True)
