"""The batch script's own logic, with stand-ins for Slurm's commands and for Python that write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT

STUBS = {
    "srun": """case "$*" in
        *"preflight measure"*) exec sleep "$MEASURE" ;;
        *launcher.run*) echo "shutdown $TORCH_ELASTIC_SHUTDOWN_TIMEOUT in $PWD" >>"$CALLS"; exit "$TRAIN" ;;
        *) while [ "$1" != "$SWAX_PYTHON" ]; do shift; done; exec "$@" ;;
    esac""",
    "scontrol": """case "$*" in
        "show hostnames"*) printf 'n0\\nn1\\n' ;;
        "-o show job"*) echo "JobId=17 ReqNodeList=(null) ExcNodeList=$EXCLUDED Features=(null)" ;;
        release*) exit "$RELEASE" ;;
    esac""",
    "squeue": 'echo "$COMMENT"',
    "scancel": "",
    "python": """case "$*" in
        *"batch prepare"*) mkdir -p "$RUN/snapshot"; printf '%s\\t%s\\n' "$RUN" "$RUN/snapshot" ;;
        *"batch decide"*) sleep "${DECIDING:-0}"; printf '%b\\n' "$DECIDE" ;;
        *"preflight judge"*) [ -z "$UNFIT" ] || { echo "$UNFIT"; exit 77; } ;;
    esac""",
}


class Script:
    """A running batch script. calls: what it called, a line each."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.calls_file = folder / "calls"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, body in STUBS.items():
            stub = bin_folder / name
            stub.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
            stub.chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SWAX_", "TORCH_"))}
        given = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "RUN": str(folder / "run"),
            "SWAX_PYTHON": str(bin_folder / "python"),
            "SWAX_HOME": str(ROOT),
            "SWAX_SCRATCH": "/tmp",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[0-1]",
            **dict(MEASURE="0", TRAIN="0", RELEASE="0", EXCLUDED="(null)", COMMENT="(null)", UNFIT=""),
            "DECIDE": "finish\\t0\\t0\\tfinished",
        }
        self.process = subprocess.Popen(
            ["bash", "slurm/pretrain_7b.sh", *arguments],
            cwd=ROOT,
            env={**kept, **given, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def calls(self) -> str:
        return self.calls_file.read_text() if self.calls_file.exists() else ""

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.calls:
            assert time.monotonic() < deadline and self.process.poll() is None, self.calls
            time.sleep(0.02)

    def ended(self) -> tuple[int, str]:
        """Exit code and what it said."""
        said = self.process.communicate(timeout=60)[0]
        return self.process.returncode, said


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Script]:
    return lambda *arguments, **environment: Script(tmp_path, *arguments, **environment)


REQUEUE = "requeue\\t75\\t0\\tthe time of this allocation is over"
RESTART = "restart\\t137\\t600\\texit code 137"


def test_a_start_checks_trains_and_notes_its_run_directory(script: Callable[..., Script], tmp_path: Path) -> None:
    run = script("--config", "configs/demo.yaml", "train.steps=5")
    code, said = run.ended()
    assert code == 0, said
    assert f"scontrol update JobId=17 Comment=swax:{tmp_path}/run\n" in run.calls
    assert f"shutdown 3600 in {tmp_path}/run/snapshot\n" in run.calls, "a save of more than five minutes is not cut short"
    measure = next(line for line in run.calls.splitlines() if "preflight measure" in line)
    assert "--kill-on-bad-exit=0" in measure and "--time=17" in measure
    assert "--kill-on-bad-exit=1" in next(line for line in run.calls.splitlines() if "launcher.run" in line)
    assert "--next 17_0.1 --code 0" in run.calls


@pytest.mark.parametrize(("number", "action"), [(signal.SIGUSR1, "requeue 17"), (signal.SIGTERM, None)])
def test_a_signal_in_the_checks_trains_nothing(script: Callable[..., Script], number: int, action: str | None) -> None:
    """The time limit: requeued, as after a save, not finished. TERM: the rest is Slurm's."""
    run = script(MEASURE="3", DECIDE=REQUEUE)
    run.until("preflight measure")
    run.process.send_signal(number)
    code, said = run.ended()
    assert code == 75 and "launcher.run" not in run.calls, said
    if action:
        assert "--code 75 --signalled" in run.calls and f"scontrol {action}\n" in run.calls
    else:
        assert "scontrol requeue" not in run.calls and "batch decide" not in run.calls


@pytest.mark.parametrize("after", [0.0, 0.3], ids=["as it is decided", "in the delay"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_delay_before_a_restart(script: Callable[..., Script], number: int, after: float) -> None:
    run = script(TRAIN="137", DECIDE=RESTART, SWAX_PREFLIGHT="0", DECIDING="0" if after else "0.5")
    run.until("batch decide")
    time.sleep(after)
    run.process.send_signal(number)
    code, said = run.ended()
    assert code == 75 and "next start in 600 s" in said
    assert ("scontrol requeue 17\n" in run.calls) == (number == signal.SIGUSR1)
    assert "batch begin" not in run.calls, "a start that never was counts against nobody's patience"


@pytest.mark.parametrize(("before", "after"), [("(null)", "n1"), ("n7,n[20-24]", "n7,n[20-24],n1")])
def test_an_exclusion_is_added_to_those_there_are(script: Callable[..., Script], before: str, after: str) -> None:
    run = script(UNFIT="n1", EXCLUDED=before, RELEASE="1", DECIDE="requeue\\t77\\t0\\ta node failed its checks")
    code, said = run.ended()
    assert code == 75 and "--code 77" in run.calls
    assert f"scontrol update JobId=17 ExcNodeList={after}\n" in run.calls
    assert run.calls.index("requeuehold 17") < run.calls.index("ExcNodeList") < run.calls.index("release 17")
    assert "could not release this job, it stays held until you do: scontrol release 17" in said


def test_one_task_of_an_array_speaks_for_itself_alone(script: Callable[..., Script]) -> None:
    """The last task bears the array's number: a requeue of that number would be one of all tasks."""
    run = script(SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="3", DECIDE=REQUEUE, SWAX_PREFLIGHT="0", TRAIN="75")
    assert run.ended()[0] == 75
    assert "scontrol requeue 17_3\n" in run.calls and "--job 17-3" in run.calls


def test_a_requeued_job_goes_on_with_what_was_submitted(script: Callable[..., Script], tmp_path: Path) -> None:
    frozen = tmp_path / "run" / "snapshots" / "17"
    frozen.mkdir(parents=True)
    (frozen / "config.yaml").touch()
    run = script("--config", "gone.yaml", "train.steps=5", SLURM_RESTART_COUNT="1", COMMENT=f"swax:{tmp_path}/run")
    code, said = run.ended()
    assert code == 0, said
    prepare = next(line for line in run.calls.splitlines() if "batch prepare" in line)
    assert f"prepare {frozen}/config.yaml --nodes" in prepare and "train.steps" not in prepare


def test_a_requeue_before_the_first_snapshot_reads_the_configuration(script: Callable[..., Script]) -> None:
    run = script("--config", "configs/demo.yaml", "train.steps=5", SLURM_RESTART_COUNT="1")
    code, said = run.ended()
    assert code == 0 and "no earlier start of this job came as far as a snapshot: reading configs/demo.yaml" in said
    assert "prepare configs/demo.yaml train.steps=5 --nodes" in run.calls


def test_a_site_s_scripts_may_use_unset_variables(script: Callable[..., Script], tmp_path: Path) -> None:
    """And a container's helpers on the first node see its GPUs."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("[ -z $NOT_SET_EITHER ]\n")
    site = tmp_path / "site.sh"
    site.write_text(
        'export SITE_PATH="/opt:$NOT_SET_ANYWHERE"\nmodule() { [ -z "$NOT_SET" ]; }\nSWAX_MODULES=cuda SWAX_VENV="$VENV"\n'
        "SWAX_CONTAINER=image SWAX_CONTAINER_RUNTIME=pyxis\n"
    )
    run = script(SWAX_SITE=str(site), VENV=str(tmp_path / "venv"), SLURM_GPUS_ON_NODE="8", SLURM_CPUS_ON_NODE="4")
    code, said = run.ended()
    assert code == 0, said
    prepare = next(line for line in run.calls.splitlines() if line.startswith("srun") and "batch prepare" in line)
    assert "--gres=gpu:8" in prepare and "--container-image=image" in prepare


@pytest.mark.parametrize("name", ["shard.sh", "convert_hf.sh", "eval.sh"])
def test_dry_runs_on_the_login_node_name_the_command(name: str) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SWAX_"))}
    command = ["bash", f"slurm/{name}", "--out", "y", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0 and " --out y" in done.stdout, done.stderr
    assert "submit it with sbatch" in subprocess.run(command[:-1], cwd=ROOT, env=kept, capture_output=True, text=True).stderr
