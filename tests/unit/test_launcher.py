"""python -m launcher.run: what it plans, what it refuses before anything starts, and how it passes on how a run ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launcher.run import Plan, choose_processes, make_plan
from swax_megatron.config import from_dict, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A valid configuration whose data folder holds a manifest."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": 512}}))
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"pattern": "MS", "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 512, "attention_heads": 4, "mlstm_heads": 4},
        "window": {"windows": [8]},
        "data": {"train": [{"path": str(data)}], "sequence_length": 64},
        "optimizer": {"warmup": 1},
        "train": {"steps": 2, "global_batch_size": 4},
        "validation": {"interval": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def launch(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "launcher.run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_dry_run_prints_the_plan_and_the_resolved_configuration(settings: Path, tmp_path: Path) -> None:
    done = launch(str(settings), "parallel.tensor=2", "--processes", "4", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "4 process(es) on the CPU: tensor 2 x pipeline 1 x context 1 x data 2" in done.stderr
    command, _, resolved = done.stdout.partition("\n")
    assert f"-m swax_megatron.train {settings} parallel.tensor=2" in command
    for name in ("OMP_NUM_THREADS=", "GLOO_SOCKET_IFNAME=", "DS_ACCELERATOR=cpu", "TOKENIZERS_PARALLELISM=false"):
        assert name in command
    assert yaml.safe_load(resolved)["model"]["attention_head_dim"] == 8
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=3"], "error: unknown config field 'train.stepz'; did you mean 'train.steps'?\n"),
        (["parallel.context=3"], "error: data.sequence_length=64: must be divisible by parallel.context=3"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_code_2(settings: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = launch(str(settings), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "requested", "message"),
    [
        ("parallel.tensor=2", 3, r"--processes 3: must be a multiple of the model-parallel size \(tensor 2 "),
        ("parallel.tensor=1", 0, "--processes 0"),
        ("parallel.tensor=1", 3, r"train.global_batch_size=4: must be divisible"),
        ("data.train.0.path=nowhere", None, r"data.train.0.path='nowhere': no manifest.json"),
    ],
)
def test_plans_that_are_refused(settings: Path, override: str, requested: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(load_config(settings, [override]), [str(settings), override], requested)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "gpus", "requested", "nodes", "expected"),
    [
        (1, 1, 0, None, 1, 1),  # the CPU: one copy of the model
        (2, 2, 0, None, 1, 4),
        (2, 1, 0, 6, 1, 6),
        (1, 1, 8, None, 1, 8),  # GPUs: all of them
        (2, 2, 8, None, 1, 8),
        (2, 1, 1, None, 1, 2),  # two ranks share one
        (2, 1, 8, 4, 1, 4),
        (2, 1, 0, None, 2, 2),  # several nodes: one copy over them, or as many as make every node start alike
        (1, 1, 0, None, 3, 3),
        (2, 1, 0, None, 3, 6),
        (8, 2, 8, None, 4, 32),
        (8, 2, 8, 16, 2, 16),
    ],
)
def test_number_of_processes(tensor: int, pipeline: int, gpus: int, requested: int | None, nodes: int, expected: int) -> None:
    assert choose_processes(from_dict({"parallel": {"tensor": tensor, "pipeline": pipeline}}), gpus, requested, nodes) == expected


@pytest.mark.parametrize(
    ("tensor", "pipeline", "gpus", "nodes", "message"),
    [
        (3, 1, 8, 1, "8 GPUs cannot be divided .* or --processes 6"),
        (1, 2, 1, 1, "parallel.pipeline=2: 2 processes would share 1 GPU"),
        (8, 3, 8, 2, "is more than 2 nodes x 8 GPUs; ask for more nodes"),
        (8, 3, 8, 4, r"4 nodes x 8 GPUs cannot be divided .* or --processes 24"),
    ],
)
def test_layouts_that_do_not_fit_the_gpus(tensor: int, pipeline: int, gpus: int, nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_processes(from_dict({"parallel": {"tensor": tensor, "pipeline": pipeline}}), gpus, None, nodes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "error: --node-rank None: with --nodes 2 give every node its own, from 0 on\n"),
        (["--nodes", "2", "--node-rank", "0"], "error: --rendezvous None: with several nodes name the head node and a free port"),
        (["--nodes", "2", "--node-rank", "1", "--rendezvous", "here:1"], "error: --name: with several nodes"),
        (["--nodes", "2", "--processes", "3"], "error: --processes 3: must be a multiple of the 2 nodes"),
    ],
)
def test_several_nodes_need_to_find_each_other(settings: Path, arguments: list[str], message: str) -> None:
    done = launch(str(settings), *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


LAUNCH = """
import sys
from pathlib import Path
from launcher.run import Plan, start
plan = Plan(int(sys.argv[2]), 0, int(sys.argv[2]), {"OMP_NUM_THREADS": "1"}, (sys.executable, "-u", "-c", sys.argv[3]))
sys.exit(start(plan, Path(sys.argv[1])))
"""


def run_workers(run_dir: Path, processes: int, code: str) -> subprocess.Popen:
    """Workers that run a piece of Python, under the launcher."""
    command = [sys.executable, "-c", LAUNCH, str(run_dir), str(processes), code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_workers_get_ranks_and_logs_and_rank_0_the_console(tmp_path: Path) -> None:
    code = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'])"
    job = run_workers(tmp_path, 2, code)
    out, error = job.communicate(timeout=120)
    assert job.returncode == 0, error
    assert (out, error) == ("", "rank 0 of 2 0\n")
    assert [log.read_text() for log in sorted(tmp_path.glob("logs/*/rank_[01].log"))] == ["rank 0 of 2 0\n", "rank 1 of 2 1\n"]


def test_the_first_failure_is_told_and_its_code_passed_on(tmp_path: Path) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': print('no luck', file=sys.stderr); sys.exit(7)\ntime.sleep(60)"
    job = run_workers(tmp_path, 2, code)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 7
    assert "no luck" in error and "rank 1 ended first, with exit code 7; its log: " in error
    assert "Traceback" not in error


def test_a_killed_worker_ends_the_job(tmp_path: Path) -> None:
    code = "import os, signal, time\nif os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    job = run_workers(tmp_path, 2, code)
    _, error = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGKILL
    assert "rank 0 ended first, with signal 9" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_worker(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import os, signal, sys, time
from pathlib import Path
mark = Path({str(tmp_path)!r}) / os.environ["RANK"]
def stop(*_):
    mark.write_text("told")
    sys.exit(0)
signal.signal({int(number)}, stop)
mark.write_text("ready")
time.sleep(60)
"""
    job = run_workers(tmp_path, 2, code)
    marks = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 100
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(number)
    _, error = job.communicate(timeout=100)
    assert [mark.read_text() for mark in marks] == ["told", "told"]
    assert job.returncode == 128 + number
    assert f"stopped by {number.name}" in error and "Traceback" not in error


def test_plan_describes_itself() -> None:
    plan = Plan(2, 1, 1, {"OMP_NUM_THREADS": "4"}, ("python",))
    text = plan.describe(from_dict({"parallel": {"tensor": 2}}))
    assert text == "2 process(es) on 1 GPU(s), sharing over gloo: tensor 2 x pipeline 1 x context 1 x data 1; 4 thread(s) each"
