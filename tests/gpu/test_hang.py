"""A hang on GPUs: ended in time, with the stacks and NCCL's last collectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swax_megatron.errors import ExitCode
from tests.faults import jobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_the_flight_recorder_of_a_hang(corpus: Path, tmp_path: Path) -> None:
    """The last rank sleeps in a step. One GPU is enough: NCCL records a group of one as well."""
    processes = min(2, torch.cuda.device_count())
    limits = {"hang_minimum": 20.0, "hang_unknown": 20.0, "hang_factor": 3.0}
    fault = {"fault": "sleep", "fault_rank": processes - 1, "fault_step": 4, "fault_seconds": 600, **limits}
    job = jobs.Job(jobs.config(corpus, tmp_path / "run", resilience=fault), processes=processes)
    assert job.ended() == ExitCode.HUNG, job.text()[-3000:]
    print(job.text()[-1500:])
    assert "error: hang: compute of step 4 takes longer than 20 s" in job.text()
    if processes > 1:  # the others wait in a collective over NCCL, which no stack of Python shows
        assert [event["behind"] for event in jobs.events(tmp_path / "run", "hang")] == [[processes - 1]]
    stacks = tmp_path / "run" / "hangs" / "attempt_1"
    for rank in range(processes):
        assert "train_step" in (stacks / f"rank_{rank:05d}.txt").read_text()
        recorded = json.loads((stacks / f"rank_{rank:05d}_nccl_collectives.json").read_text())["entries"]
        assert any(entry["profiling_name"].startswith("nccl:") for entry in recorded), recorded[:3]
