"""SIGKILL at random moments of saving and loading, in a chain: every start resumes what the killed one before it had completed.

After every kill the newest checkpoint is complete, verifies byte by byte and is not older than the one before; the losses of all
the pieces together are those of a run that nobody killed, to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swax_megatron.checkpoint.store import latest, open_checkpoint
from tests import runs
from tests.resume.test_resume import logged
from tests.workers import free_port

RANKS = 2
ROOT = Path(__file__).parents[2]
DEADLINE = 240.0  # seconds for a start to reach the moment at which it is to die
# 3 M parameters, 38 MB a checkpoint: a save is long enough to be hit in its middle
MODEL = {"hidden_size": 64, "ffn_hidden_size": 2048}


@dataclass
class Death:
    """Where a start was killed. first: "rank 0", "rank 1" or "all"; others follow within a moment."""

    number: int
    background: bool
    phase: str  # "save" or "load"
    first: str
    resumed_from: int
    under_way: int  # temporary folders of a step that is not complete: its save had begun and had not ended
    left_over: int  # files in them
    newest: int

    @property
    def in_save(self) -> bool:
        return self.phase == "save" and self.under_way > 0


def serve() -> None:
    """A process that has imported the program and forks its ranks: a start costs no imports. One JSON line in, one process id out."""
    import logging

    from swax_megatron.parallel.device import install_cpu_shim
    from swax_megatron.train import main, quiet_libraries

    quiet_libraries()
    install_cpu_shim()
    import swax_megatron.build
    import swax_megatron.optim.zero  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the killed are not waited for
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(task["log"], os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(task["environment"])
            os._exit(main([task["config"]]))
        print(child, flush=True)


class Ranks:
    """The program's processes, one start after the other, forked by ``serve``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = "from tests.resume.test_kill_soak import serve; serve()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self.alive: list[int] = []
        self.logs: list[Path] = []

    def start(self, raw: dict[str, Any], number: int) -> None:
        config, port = self.folder / f"config_{number}.yaml", str(free_port())
        config.write_text(yaml.safe_dump(raw))
        self.logs = [self.folder / f"log_{number}_{rank}.txt" for rank in range(RANKS)]
        self.alive = []
        for rank, log in enumerate(self.logs):
            log.touch()
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            named = {name: str(value) for name, value in environment.items()}
            self._server.stdin.write(json.dumps({"config": str(config), "log": str(log), "environment": named}) + "\n")
            self._server.stdin.flush()
            self.alive.append(int(self._server.stdout.readline()))

    def wait_until(self, condition: Any) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            ended = [pid for pid in self.alive if not Path(f"/proc/{pid}").exists()]
            assert not ended and time.monotonic() < deadline, "\n".join(log.read_text()[-1500:] for log in self.logs)
            time.sleep(0.001)

    def kill(self, first: str, draw: random.Random) -> None:
        order = list(self.alive) if first == "all" else sorted(self.alive, key=lambda pid: pid != self.alive[int(first[-1])])
        for index, pid in enumerate(order):
            with contextlib.suppress(ProcessLookupError):  # the other's death may end a rank before we do
                os.kill(pid, signal.SIGKILL)
            if index == 0 and first != "all":
                time.sleep(draw.uniform(0.0, 0.3))
        while any(Path(f"/proc/{pid}").exists() for pid in order):
            time.sleep(0.001)
        self.alive = []

    def close(self) -> None:
        for pid in self.alive:
            os.kill(pid, signal.SIGKILL)
        self._server.kill()
        self._server.wait()


class Folders:
    """The temporary folders of this start's saves: those that were not there before it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._before = set(root.glob("step_*.tmp-*"))

    def now(self) -> list[Path]:
        """Those of a save that is under way: its step is not complete yet."""
        found = [path for path in self.root.glob("step_*.tmp-*") if path not in self._before]
        return [path for path in found if int(path.name[5:].partition(".")[0]) > newest_step(self.root)]


def newest_step(root: Path) -> int:
    return max((int(path.parent.name[5:]) for path in root.glob("step_*/COMPLETE") if path.parent.name[5:].isdigit()), default=-1)


def chain(corpus: Path, folder: Path, kills: int, seed: int, workers: Any) -> list[Death]:
    """Starts and kills until ``kills`` fell into a save; those that hit no save, and those while loading, are extra."""
    draw = random.Random(seed)
    starts = 2 * kills + 2  # at most
    steps = 4 * starts
    run_dir = folder / "run"
    raw = runs.small_config(corpus, run_dir, model=MODEL, train={"steps": steps}, checkpoint={"interval": 1, "keep_last": 2})
    alone = {**raw, "run_dir": str(folder / "whole"), "checkpoint": {"interval": 0}}
    expected = workers(RANKS).run(runs.train, alone)[0]["loss/train"]
    deaths: list[Death] = []
    ranks = Ranks(folder)
    try:
        while sum(death.in_save for death in deaths) < kills:
            assert len(deaths) < starts, f"too few of {starts} kills fell into a save: {deaths}"
            _kill_once(ranks, raw, expected, draw, deaths)
    finally:
        ranks.close()
    raw["checkpoint"].update(asynchronous=True, interval=20)
    resumed = workers(RANKS).run(runs.train, raw)[0]
    assert resumed["first_step"] == [float(deaths[-1].newest)]
    assert [line["step"] for line in logged(run_dir)] == list(range(steps))
    assert [line["loss/train"] for line in logged(run_dir)] == expected
    return deaths


def _kill_once(ranks: Ranks, raw: dict[str, Any], expected: list[float], draw: random.Random, deaths: list[Death]) -> None:
    """Start the run and kill it: in turn in a background save, in one that training waits for, and now and then while it loads."""
    run_dir = Path(raw["run_dir"])
    root = run_dir / "checkpoints"
    number, duration = len(deaths), 1.0  # seconds that the last save took
    background = sum(death.in_save for death in deaths) % 2 == 0
    phase = "load" if number % 6 == 5 else "save"
    first = draw.choice(["all", "rank 0", "rank 1"])
    raw["checkpoint"]["asynchronous"] = background
    before = deaths[-1].newest if deaths else 0
    temporary = Folders(root)
    ranks.start(raw, number)
    if phase == "load":
        ranks.wait_until(lambda: "resuming from" in ranks.logs[0].read_text())
        time.sleep(draw.uniform(0.0, 0.4))
    else:
        for _ in range(draw.randint(1, 2)):  # saves of this start that end: they tell how long one takes
            ranks.wait_until(temporary.now)
            began, there = time.monotonic(), newest_step(root)
            ranks.wait_until(lambda there=there: newest_step(root) > there)
            duration = time.monotonic() - began
        ranks.wait_until(temporary.now)
        time.sleep(draw.uniform(0.0, duration))
    ranks.kill(first, draw)
    newest = latest(root)
    assert newest is not None
    checkpoint = open_checkpoint(newest)
    checkpoint.verify(ranks_share=False)
    resumed = [log for log in ranks.logs if f"resuming from {root}" in log.read_text()]
    folders = temporary.now()
    files = sum(len(list(path.iterdir())) for path in folders)
    deaths.append(Death(number, background, phase, first, before if resumed else 0, len(folders), files, checkpoint.step))
    print(deaths[-1], flush=True)
    assert checkpoint.step >= before, "a kill cost a checkpoint that was complete"
    assert bool(resumed) == (before > 0), "the start did not resume"
    found = [line["loss/train"] for line in logged(run_dir)]
    assert found[: checkpoint.step] == expected[: checkpoint.step], f"losses differ after kill {number}"


def test_killed_while_saving(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """A sample of the soak: one kill of a background save, one of a save that training waits for."""
    deaths = chain(corpus, tmp_path, 2, 1, workers)
    assert [death.background for death in deaths if death.in_save] == [True, False]


@pytest.mark.soak
def test_killed_thirty_times(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """SWAX_SOAK_RECORD names a file that gets the result as a JSON line."""
    began, seed = time.monotonic(), os.environ.get("SWAX_SOAK_SEED", "7")
    deaths = chain(corpus, tmp_path, 30, int(seed), workers)
    during = [death for death in deaths if death.in_save]
    assert len(during) == 30
    background = sum(death.background for death in during)
    result = {
        "case": "kill soak",
        "kills": len(deaths),
        "in_a_save": len(during),
        "in_a_background_save": background,
        "in_a_synchronous_save": len(during) - background,
        "with_files_half_way": sum(death.left_over > 0 for death in during),
        "while_loading": sum(death.phase == "load" for death in deaths),
        "beside_a_save": sum(death.phase == "save" and not death.in_save for death in deaths),
        "resumed_from_a_complete_checkpoint_with_equal_losses": len(deaths),  # asserted for each
        "last_step": deaths[-1].newest,
        "ranks": RANKS,
        "seconds": round(time.monotonic() - began, 1),
        "device": f"CPU, {os.cpu_count()} cores ({platform.machine()})",
        "torch": torch.__version__,
        "date": time.strftime("%F"),
        "command": f"SWAX_SOAK_SEED={seed} pytest -m soak tests/resume/test_kill_soak.py",
    }
    print(json.dumps(result))
    if record := os.environ.get("SWAX_SOAK_RECORD"):
        with Path(record).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
