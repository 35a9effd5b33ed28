"""The batch script on a real two-node Slurm: it trains, it refuses, it only says what it would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs
from tests.slurm.jobs import STEPS, Cluster, Job, config, losses


@pytest.fixture(scope="session")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory, workers: Any) -> dict[int, float]:
    """Losses of the same run on one machine that nothing happened to."""
    raw = config(corpus, tmp_path_factory.mktemp("whole") / "run")
    return dict(enumerate(workers(2).run(runs.train, raw)[0]["loss/train"]))


def test_two_nodes_train_as_one_machine_does(cluster: Cluster, corpus: Path, tmp_path: Path, uninterrupted: dict[int, float]) -> None:
    """One sbatch: one agent a node, one log a rank, a snapshot, and the losses of one machine to the last bit."""
    job = Job(config(corpus, tmp_path / "run"))
    assert job.ended() == "COMPLETED", job.text()
    assert losses(job.run_dir) == uninterrupted
    assert job.shown("Comment") == f"swax:{job.run_dir}", "launcher.submit --status and its checks know plain jobs by it"
    logs = job.run_dir / "logs" / f"{job.id}_0"
    assert {path.name for path in logs.glob("rank_*.log")} == {"rank_0.log", "rank_1.log"}
    assert {json.loads(path.read_text())["node"] for path in logs.glob("node_*.json")} == {"sn0", "sn1"}
    snapshot = job.run_dir / "snapshots" / job.id
    assert yaml.safe_load((snapshot / "config.yaml").read_text())["train"]["steps"] == STEPS
    assert (snapshot / "swax_megatron" / "train.py").exists() and json.loads((snapshot / "version.json").read_text())["python"]
    assert [json.loads(line)["step"] for line in (job.run_dir / "starts.jsonl").read_text().splitlines()] == [-1]


def test_the_first_thing_that_a_user_types(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """The demo's own configuration and the script as they are; only the data are these tests', and the steps few."""
    data = (f"data.train.0.path={corpus}/a", f"data.validation.0.path={corpus}/validation", "model.vocab_size=200")
    job = Job.plain("configs/demo.yaml", tmp_path / "run", *data, "train.steps=3", "optimizer.warmup=1")
    assert job.ended() == "COMPLETED", job.text()
    assert sorted(losses(job.run_dir)) == [0, 1, 2] and job.shown("NumNodes") == "2"
    assert "2 nodes with 1 process(es) on the CPU: tensor 2" in job.text()
    assert "preflight: sn0: fit (" in job.text() and "preflight: sn1: fit (" in job.text()
    verdict = json.loads((job.run_dir / "logs" / f"{job.id}_0" / "preflight.json").read_text())
    assert verdict == {"code": 0, "unfit": {}}


def test_a_dry_run_starts_nothing_and_a_mistake_ends_with_2(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    dry = Job(config(corpus, tmp_path / "dry"), "--dry-run")
    wrong = Job(config(corpus, tmp_path / "wrong"), "train.stepz=3", options=("--nodes=1",))
    assert (dry.ended(), wrong.ended()) == ("COMPLETED", "FAILED"), dry.text() + wrong.text()
    assert "2 nodes with 1 process(es) on the CPU: tensor 2" in dry.text()
    assert "launcher.run" in dry.text() and "--nodes 2 --rendezvous sn" in dry.text()
    assert "error: unknown config field 'train.stepz'" in wrong.text() and wrong.shown("ExitCode") == "2:0"
    assert not (tmp_path / "dry").exists() and not (tmp_path / "wrong").exists()
