"""python -m launcher.submit against a real Slurm: what it refuses before anything is queued, what it queues, what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.submit import main
from tests.slurm.jobs import Cluster, config, slurm


@pytest.fixture
def file(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config(corpus, tmp_path / "run")))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "4"], "--nodes 4: partition main has 3 node(s)"),
        (["--nodes", "2", "--partition", "gpu"], "--partition gpu: this cluster has no such partition that is up; choose one of: main, "),
        (["--nodes", "2", "--partition", "short", "--time", "2:00:00"], "--time 2:00:00: partition short ends jobs after 60 minutes"),
        (["--nodes", "2", "--partition", "short"], "--time 24:00:00: partition short ends jobs after 60 minutes"),  # the script's own
        (["--nodes", "2", "--time", "10"], "--time 10: the ranks are told to save 600 s before the limit"),
        (["--nodes", "2", "--gpus-per-node", "many"], "--gpus-per-node many: give a number, or a kind and a number like h100:8"),
        (["--nodes", "2", "--gpus-per-node", "8"], "--gpus-per-node 8: the nodes of partition main have 0"),
        (["--nodes", "3"], "train.global_batch_size=4: must be divisible"),
        (["--nodes", "2", "parallel.tensor=3"], "model.attention_heads=4: must be divisible by parallel.tensor=3"),
        (["--nodes", "2", "data.train.0.path=nowhere"], "data.train.0.path='nowhere': no manifest.json there"),
        (["--nodes", "2", "--site", "nowhere.sh"], "--site nowhere.sh: no such file"),
        (["--nodes", "2", "--chain", "0"], "--chain 0"),
        (["--nodes", "2", "--time", "soon"], "--time soon: give minutes"),
        (["--cancel", "999"], "--cancel 999: no job of launcher.submit"),
        (["--tail", "999"], "--tail 999: neither a run directory nor a job"),
    ],
)
def test_refused_in_words_before_anything_is_queued(
    cluster: Cluster, file: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments if arguments[0] in ("--cancel", "--tail") else [str(file), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}") and told.count("\n") == 1
    assert slurm("squeue", "-h") == ""


def test_what_the_environment_tells_sbatch_is_checked_too(
    cluster: Cluster, file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert main([str(file), "--nodes", "2", "--dry-run", *arguments]) == 2
        return capsys.readouterr().err

    monkeypatch.setenv("SBATCH_PARTITION", "short")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1:30:00")
    assert refused().startswith("error: --time 1:30:00: partition short ends jobs after 60 minutes")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "15")
    assert main([str(file), "--nodes", "2", "--dry-run"]) == 0
    monkeypatch.setenv("SBATCH_SIGNAL", "B:USR1@1200")
    assert "told to save 1200 s before" in refused()
    assert main([str(file), "--nodes", "2", "--dry-run", "--time", "30"]) == 0
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "h100:8")
    assert "error: --gpus-per-node 8: the nodes of partition short have 0" in refused("--time", "30")


def test_relative_paths_count_from_the_project_s_folder(
    cluster: Cluster, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they would be checked in one folder and read by the job in another."""
    monkeypatch.chdir(tmp_path)
    assert main(["tiny.yaml", "--nodes", "2", "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["tiny.yaml", "--nodes", "2", "--dry-run", "run_dir=runs/mine"]) == 2
    assert "has relative paths, which a job reads from" in capsys.readouterr().err


def test_no_scratch_and_no_default_partition_are_refused(
    cluster: Cluster, file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm("scontrol", "update", "PartitionName=main", "Default=NO")
    try:
        assert main([str(file), "--nodes", "2"]) == 2
        assert "error: --partition: this cluster has no default; choose one of: main, short" in capsys.readouterr().err
    finally:
        slurm("scontrol", "update", "PartitionName=main", "Default=YES")
    monkeypatch.delenv("SWAX_SCRATCH")
    assert main([str(file), "--nodes", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: SWAX_SCRATCH is not set: name a folder")


def test_a_chain_is_queued_shown_and_cancelled(cluster: Cluster, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Held jobs, so that nothing starts: the queue, the dependencies, and the second job for the same run that is refused."""
    slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        assert main([str(file), "--nodes", "2"]) == 2
        assert "choose one of: short" in capsys.readouterr().err
    finally:
        slurm("scontrol", "update", "PartitionName=main", "State=UP")
    for node in ("sn0", "sn1", "sn2"):
        slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    assert main([str(file), "--nodes", "2", "--chain", "2", "train.steps=9"]) == 0
    first, second = capsys.readouterr().out.split()
    assert f"afterany:{first}" in slurm("scontrol", "-o", "show", "job", second)
    assert main([str(file), "--nodes", "2"]) == 2
    assert f"run_dir='{tmp_path / 'run'}' is used by job" in capsys.readouterr().err
    other = slurm("sbatch", "--parsable", "--wrap", "true")
    assert main([str(file), "--nodes", "2", "--after", other, "--dry-run"]) == 2, "that job says nothing of the others"
    assert "is used by job" in capsys.readouterr().err
    assert main([str(file), "--nodes", "2", "--after", first, "--dry-run"]) == 2, "the second would run beside it"
    assert f"with --after {second}" in capsys.readouterr().err
    assert main([str(file), "--nodes", "2", "--after", second, "--dry-run"]) == 0, "which waits for the first"
    slurm("scancel", other)
    capsys.readouterr()
    assert main(["--status"]) == 0
    shown = capsys.readouterr().out
    assert f"{first}  PENDING" in shown and f"{second}  PENDING" in shown and "no checkpoint" in shown
    assert main(["--cancel", first, second]) == 0
    assert slurm("squeue", "-h") == ""


def test_a_sweep_is_an_array_with_a_run_a_point(
    cluster: Cluster, file: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for node in ("sn0", "sn1", "sn2"):
        slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    grid: dict[str, Any] = {"optimizer.learning_rate": [1e-3, 2e-3], "parallel.tensor": [1, 2]}
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"base": str(file), "overrides": ["train.steps=5"], "concurrent": 2, "grid": grid}))
    assert main(["--sweep", str(sweep), "--nodes", "2", "--dry-run"]) == 0
    assert "--array=0-3%2" in capsys.readouterr().out and not list((tmp_path / "run").glob("sweep_*"))
    assert main(["--sweep", str(sweep), "--nodes", "2"]) == 0
    (job,) = capsys.readouterr().out.split()
    assert main(["--status"]) == 0
    assert "003_learning_rate=0.002_tensor=2" in capsys.readouterr().out
    assert main(["--sweep", str(sweep), "--nodes", "2"]) == 2, "its points are in use"
    assert "002_learning_rate" not in (said := capsys.readouterr().err) and f"is used by job {job}_0" in said
    assert main([str(file), "--nodes", "2", f"run_dir={tmp_path}/run/001_learning_rate=0.001_tensor=2"]) == 2
    assert f"is used by job {job}_1" in capsys.readouterr().err
    slurm("scancel", job)
    sweep.write_text(yaml.safe_dump({"base": str(file), "grid": {"parallel.tensor": [2, 3]}}))
    assert main(["--sweep", str(sweep), "--nodes", "2"]) == 2, "one point that does not fit refuses them all"
    assert "parallel.tensor=3" in capsys.readouterr().err and slurm("squeue", "-h") == ""
