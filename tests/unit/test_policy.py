"""When a run is started again, and when it is not; the supervisor of one machine with real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.batch import in_use, main
from launcher.policy import Action, Ledger, Limits, Start, decide, fruitless, outcome
from launcher.submit import progress
from launcher.supervise import Supervisor
from swax_megatron.checkpoint.store import save
from swax_megatron.errors import ExitCode

ROOT = Path(__file__).parents[2]
LIMITS = Limits(restarts=5, patience=3, delay=10.0, longest=25.0)


def starts(*steps: int) -> list[Start]:
    return [Start("job", str(number), step, 0.0) for number, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("codes", "signalled", "expected"),
    [
        ([0, 0], False, 0),
        ([70, 2], False, 2),  # a mistake on one node breaks the connections of the other
        ([1, 70, 143], False, 1),
        ([143, 137], False, 137),  # an agent was killed, srun stopped the other
        ([76, 143], False, 76),
        ([77, 70], False, 77),
        ([75, 75], False, 75),
        ([75, 70], False, 70),
        ([75, 70], True, 75),  # stopped in time; one rank stumbled on its way out
        ([138, 143], True, 75),
        ([143], False, 143),
    ],
)
def test_outcome_of_several_nodes(codes: list[int], signalled: bool, expected: int) -> None:
    assert outcome(codes, signalled) == expected


@pytest.mark.parametrize(
    ("code", "begun", "now", "slurm", "signalled", "action", "ends", "delay"),
    [
        (0, [-1], 8, False, False, Action.FINISH, 0, 0.0),
        (1, [-1], 8, False, False, Action.STOP, 1, 0.0),
        (2, [-1], -1, True, False, Action.STOP, 2, 0.0),
        (70, [-1], 8, False, False, Action.RESTART, 70, 0.0),  # it gained steps: at once
        (137, [-1], -1, True, False, Action.RESTART, 137, 10.0),  # it gained none: wait, twice as long each time
        (137, [3, 8, 8], 8, True, False, Action.RESTART, 137, 20.0),
        (137, [8, 8, 8], 8, True, False, Action.STOP, 137, 0.0),  # starting again does not help
        (76, [-1, 3], 5, False, False, Action.RESTART, 76, 0.0),
        (75, [-1], 5, False, True, Action.STOP, 75, 0.0),  # the user told the supervisor
        (75, [-1], 5, False, False, Action.RESTART, 75, 0.0),  # somebody told the run
        (75, [-1], 5, True, True, Action.REQUEUE, 75, 0.0),
        (137, [-1], 5, True, True, Action.REQUEUE, 75, 0.0),  # the time limit came while a rank died
        (75, [5, 5, 5], 5, True, True, Action.STOP, 75, 0.0),  # an allocation too short to gain a step
        (77, [-1], 5, True, False, Action.REQUEUE, 77, 0.0),
        (77, [-1], 5, False, False, Action.STOP, 77, 0.0),
        (70, [0, 1, 2, 3, 4, 5], 6, False, False, Action.STOP, 70, 0.0),  # five restarts are spent
    ],
)
def test_decisions(code: int, begun: list[int], now: int, slurm: bool, signalled: bool, action: Action, ends: int, delay: float) -> None:
    found = decide(code, starts(*begun), now, LIMITS, slurm=slurm, signalled=signalled)
    assert (found.action, int(found.code), found.delay) == (action, ends, delay), found.reason


def test_waits_grow_up_to_the_longest() -> None:
    patient = Limits(restarts=99, patience=9, delay=10.0, longest=25.0)
    delays = [decide(70, starts(*[4] * count), 4, patient, slurm=False).delay for count in (1, 2, 3, 4)]
    assert delays == [10.0, 20.0, 25.0, 25.0]
    assert fruitless(starts(1, 4, 4), 4) == 2 and fruitless(starts(4, 4), 5) == 0


def test_the_ledger_survives_a_torn_line_and_keeps_jobs_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run")
    ledger.begin("7", "7_0")
    with ledger.path.open("a") as file:
        file.write('{"job": "7", "na\n')
    ledger.begin("8", "8_0")
    assert [(start.name, start.step) for start in ledger.starts("7")] == [("7_0", -1)]
    assert [start.name for start in ledger.starts("8")] == ["8_0"]


RUN = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
count = len(list(folder.glob("start_*")))
(folder / f"start_{count}").write_text(sys.argv[-1])
codes = [int(code) for code in sys.argv[2].split(",")]
sys.exit(codes[min(count, len(codes) - 1)])
"""


@pytest.mark.parametrize(("codes", "ends", "runs"), [("70,137,0", 0, 3), ("1", 1, 1), ("2", 2, 1), ("70", 70, 3), ("75,75,0", 0, 3)])
def test_the_supervisor_starts_again_or_stops(tmp_path: Path, codes: str, ends: int, runs: int) -> None:
    supervisor = Supervisor([sys.executable, "-c", RUN, str(tmp_path), codes], tmp_path, Limits(delay=0.01))
    assert supervisor.run() == ends
    names = [(tmp_path / f"start_{number}").read_text() for number in range(runs)]
    assert not (tmp_path / f"start_{runs}").exists()
    assert names == [supervisor.job, f"{supervisor.job}.1", f"{supervisor.job}.2"][:runs]
    assert [json.loads(line)["name"] for line in (tmp_path / "starts.jsonl").read_text().splitlines()] == names


SUPERVISE = """
import signal, sys
from pathlib import Path
from launcher.policy import Limits
from launcher.submit import progress
from launcher.supervise import Supervisor
from swax_megatron.checkpoint.store import save
worker = '''
import signal, sys, time
from pathlib import Path
def stop(*_):
    with (Path(sys.argv[1]) / "told").open("a") as file: file.write("x")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(Path(sys.argv[1]) / "ready").touch()
time.sleep(60)
'''
supervisor = Supervisor([sys.executable, "-c", worker, sys.argv[1]], Path(sys.argv[1]), Limits())
signal.signal(signal.SIGTERM, supervisor.stop)
sys.exit(supervisor.run())
"""


def test_a_signal_to_the_supervisor_stops_the_run_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.PREEMPTED
    assert (tmp_path / "told").read_text() == "x"
    assert "stop: told to stop; the same command goes on from the newest checkpoint" in process.stderr.read()


def test_damaged_and_replaced_checkpoints_are_told_and_end_no_launcher(tmp_path: Path) -> None:
    """A start is refused for them; what counts and shows the run's progress goes on."""
    root = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        save(root, step, [], config={}, state={})
    assert Ledger(tmp_path).step() == 6 and progress(tmp_path) == "newest checkpoint step_6"
    (root / "step_6" / "COMPLETE").write_text("")
    assert Ledger(tmp_path).step() == 4
    assert "step_6/manifest.json is not what was saved" in progress(tmp_path)
    shutil.rmtree(root / "step_6")
    (root / "step_4").rename(root / "step_4.replaced-00ff")  # killed between the renames of a replacement
    assert Ledger(tmp_path).step() == 4 and progress(tmp_path) == "newest checkpoint step_4.replaced-00ff"


def test_a_signal_before_the_child_is_there_reaches_it(tmp_path: Path) -> None:
    """Between the ledger's line and the child: it is passed on as soon as there is one."""
    code = "import time; time.sleep(60)"
    supervisor = Supervisor([sys.executable, "-c", code], tmp_path, Limits())
    begin = supervisor.ledger.begin

    def begin_and_signal(job: str, name: str) -> None:
        begin(job, name)
        supervisor.stop(signal.SIGTERM, None)

    supervisor.ledger.begin = begin_and_signal
    started = time.monotonic()
    assert supervisor.run() == ExitCode.PREEMPTED
    assert supervisor.child.returncode == -signal.SIGTERM, time.monotonic() - started


def test_the_stop_file_ends_the_supervisor_with_75(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    supervisor = Supervisor([sys.executable, "-c", RUN, str(tmp_path), "75"], tmp_path, Limits(delay=0.01))
    assert supervisor.run() == ExitCode.PREEMPTED
    assert not (tmp_path / "start_1").exists()


def judged(capsys: pytest.CaptureFixture, run_dir: Path, code: int, *more: str) -> list[str]:
    asked = ["decide", "--run-dir", str(run_dir), "--job", "7", "--name", "7_0", "--next", "7_0.1", "--code", str(code), *more]
    assert main(asked) == 0
    return capsys.readouterr().out.rstrip("\n").split("\t")


@pytest.mark.parametrize(
    ("code", "written", "action", "ends"),
    [
        (1, {}, "restart", "70"),  # srun could not create the step; a traceback of the launcher
        (1, {"node_0.json": 1, "node_1.json": 70}, "stop", "1"),  # a rank said that it cannot go on
        (1, {"preflight.json": 1}, "stop", "1"),  # every node failed the checks
        (1, {"node_0.json": 75}, "restart", "70"),
        (137, {"node_1.json": 137}, "restart", "137"),
        (0, {"preflight.json": 0, "node_0.json": 0}, "finish", "0"),
    ],
)
def test_code_1_counts_only_where_somebody_wrote_it_down(
    tmp_path: Path, capsys: pytest.CaptureFixture, code: int, written: dict[str, int], action: str, ends: str
) -> None:
    (tmp_path / "logs" / "7_0").mkdir(parents=True)
    for name, told in written.items():
        (tmp_path / "logs" / "7_0" / name).write_text(json.dumps({"code": told}))
    Ledger(tmp_path).begin("7", "7_0")
    assert judged(capsys, tmp_path, code)[:2] == [action, ends]


def test_a_restart_is_written_down_when_it_happens_under_the_name_it_will_have(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("7", "7_0")
    assert judged(capsys, tmp_path, 137)[0::2] == ["restart", "10"]  # it gained nothing: later, by begin
    assert [start.name for start in ledger.all()] == ["7_0"]
    assert main(["begin", "--run-dir", str(tmp_path), "--job", "7", "--name", "7_0.1"]) == 0
    assert [start.name for start in ledger.starts("7")] == ["7_0", "7_0.1"]
    gained = Ledger(tmp_path / "other")
    gained.begin("7", "7_0")
    monkeypatch.setattr(Ledger, "step", lambda _: 4)
    assert judged(capsys, tmp_path / "other", 137)[0::2] == ["restart", "0"]
    assert [start.name for start in gained.all()] == ["7_0", "7_0.1"]


@pytest.mark.parametrize("more", [(), ("--signalled",)])
def test_a_stop_file_ends_a_slurm_job(tmp_path: Path, capsys: pytest.CaptureFixture, more: tuple[str, ...]) -> None:
    """Where it would have been requeued, to be refused at its next start."""
    Ledger(tmp_path).begin("7", "7_0")
    assert judged(capsys, tmp_path, 75, *more)[0] == "requeue"
    (tmp_path / "STOP").touch()
    assert judged(capsys, tmp_path, 75, *more)[:2] == ["stop", "75"]


def test_a_run_that_another_running_job_started_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue's answer, by a stand-in: job 6_2 runs, others are unknown to it."""
    stub = tmp_path / "squeue"
    stub.write_text('#!/bin/sh\ncase "$*" in *"-j 6_2") echo 6 ;; *) echo "error: Invalid job id specified" >&2; exit 1 ;; esac\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ledger = Ledger(tmp_path / "run")
    assert in_use(ledger, "7") is None
    ledger.begin("6-2", "6-2_0")
    assert in_use(ledger, "7") == "6-2" and in_use(ledger, "6-2") is None
    ledger.begin("5", "5_0")
    assert in_use(ledger, "7") is None
    ledger.begin("20260101_000000_12", "20260101_000000_12")  # a supervisor's
    assert in_use(ledger, "7") is None


def test_an_agent_s_own_failure_is_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from launcher import run

    def fail(*_: object) -> int:
        raise OSError("no space left for a log")

    monkeypatch.setattr(run, "run_workers", fail)
    monkeypatch.setattr(run, "make_plan", lambda *_: run.Plan(1, 0, 1, {"OMP_NUM_THREADS": "1"}, ()))
    monkeypatch.setattr(run, "validate_run_dir", lambda _: None)
    (tmp_path / "c.yaml").write_text(f"run_dir: {tmp_path}/run\n")
    assert run.main([str(tmp_path / "c.yaml")]) == ExitCode.CRASHED
    assert "no space left for a log" in capsys.readouterr().err
