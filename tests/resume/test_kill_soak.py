"""SIGKILL at random moments of saving and loading, in a chain: every start resumes what the killed one before it had completed.

After every kill the newest checkpoint is complete, verifies byte by byte and is not older than the one before; the losses of all
the pieces together are those of a run that nobody killed, to the last bit.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from swax_megatron.checkpoint.store import latest, open_checkpoint
from tests import runs
from tests.resume.test_resume import logged
from tests.workers import free_port

RANKS = 2
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
    left_over: int  # files in temporary folders: the save was under way
    newest: int


def start(raw: dict[str, Any], folder: Path, number: int) -> tuple[list[subprocess.Popen], list[Path]]:
    """The program on every rank, started as torchrun starts it."""
    config, port = folder / f"config_{number}.yaml", str(free_port())
    config.write_text(yaml.safe_dump(raw))
    processes, logs = [], []
    for rank in range(RANKS):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
        logs.append(folder / f"log_{number}_{rank}.txt")
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", "swax_megatron.train", str(config)]
            named = {name: str(value) for name, value in environment.items()}
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **named}))
    return processes, logs


def wait_until(condition: Any, processes: list[subprocess.Popen], logs: list[Path]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        ended = [index for index, process in enumerate(processes) if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, "\n".join(log.read_text()[-1500:] for log in logs)
        time.sleep(0.001)


class Folders:
    """The temporary folders of this start's saves: those that were not there before it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._before = set(root.glob("step_*.tmp-*"))

    def now(self) -> list[Path]:
        return [path for path in self.root.glob("step_*.tmp-*") if path not in self._before]


def kill(processes: list[subprocess.Popen], first: str, draw: random.Random) -> None:
    order = list(processes) if first == "all" else sorted(processes, key=lambda process: process is not processes[int(first[-1])])
    for index, process in enumerate(order):
        process.kill()
        if index == 0 and first != "all":
            time.sleep(draw.uniform(0.0, 0.3))
    for process in processes:
        process.wait()


def chain(corpus: Path, folder: Path, kills: int, seed: int, workers: Any) -> list[Death]:
    draw = random.Random(seed)
    steps = 3 * kills + 6
    run_dir, root = folder / "run", folder / "run" / "checkpoints"
    raw = runs.small_config(corpus, run_dir, model=MODEL, train={"steps": steps}, checkpoint={"interval": 1, "keep_last": 2})
    alone = {**raw, "run_dir": str(folder / "whole"), "checkpoint": {"interval": 0}}
    expected = workers(RANKS).run(runs.train, alone)[0]["loss/train"]
    deaths: list[Death] = []
    duration = 1.0  # seconds a save takes, learnt from the saves that were seen
    for number in range(kills):
        background = number % 2 == 0
        phase = "load" if number % 6 == 5 else "save"
        first = draw.choice(["all", "rank 0", "rank 1"])
        raw["checkpoint"]["asynchronous"] = background
        before = deaths[-1].newest if deaths else 0
        temporary = Folders(root)
        processes, logs = start(raw, folder, number)
        if phase == "load":
            wait_until(lambda logs=logs: "resuming from" in logs[0].read_text(), processes, logs)
            time.sleep(draw.uniform(0.0, 0.4))
        else:
            for wanted in range(before + 1, before + draw.randint(1, 3)):
                wait_until(lambda wanted=wanted: (root / f"step_{wanted}" / "COMPLETE").exists(), processes, logs)
            wait_until(temporary.now, processes, logs)
            began = time.monotonic()
            if number == 0:
                wait_until(lambda: list(root.glob("step_*/COMPLETE")), processes, logs)
                duration = time.monotonic() - began
                wait_until(temporary.now, processes, logs)
            time.sleep(draw.uniform(0.0, 1.2 * duration))
        kill(processes, first, draw)
        newest = latest(root)
        assert newest is not None
        checkpoint = open_checkpoint(newest)
        checkpoint.verify(ranks_share=False)
        resumed = [log for log in logs if f"resuming from {root}" in log.read_text()]
        left = sum(len(list(path.iterdir())) for path in temporary.now())
        deaths.append(Death(number, background, phase, first, before if resumed else 0, left, checkpoint.step))
        print(deaths[-1], flush=True)
        assert checkpoint.step >= before, "a kill cost a checkpoint that was complete"
        assert bool(resumed) == (before > 0), "the start did not resume"
        found = [line["loss/train"] for line in logged(run_dir)]
        assert found[: checkpoint.step] == expected[: checkpoint.step], f"losses differ after kill {number}"
    raw["checkpoint"]["asynchronous"] = True
    resumed = workers(RANKS).run(runs.train, raw)[0]
    assert resumed["first_step"] == [float(deaths[-1].newest)]
    assert [line["step"] for line in logged(run_dir)] == list(range(steps))
    assert [line["loss/train"] for line in logged(run_dir)] == expected
    return deaths


def test_killed_while_saving(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """A sample of the soak: one kill of a background save, one of a save that training waits for."""
    chain(corpus, tmp_path, 2, 1, workers)


@pytest.mark.soak
def test_killed_thirty_times(corpus: Path, tmp_path: Path, workers: Any) -> None:
    deaths = chain(corpus, tmp_path, 30, int(os.environ.get("SWAX_SOAK_SEED", "7")), workers)
    during = sum(death.phase == "save" and death.left_over > 0 for death in deaths)
    summary = {"kills": len(deaths), "in the middle of a save": during, "while loading": sum(d.phase == "load" for d in deaths)}
    print(json.dumps({**summary, "resumed with equal losses": len(deaths)}))
    assert during >= 10, "too few kills fell into a save to prove anything"
