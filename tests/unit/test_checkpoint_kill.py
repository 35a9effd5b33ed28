"""SIGKILL at every point of a save: the newest complete checkpoint is the old one or the whole new one, and the next save works."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from swax_megatron.checkpoint.store import Fragment, latest, open_checkpoint, prune, save

EVENTS = {"open", "os.mkdir", "os.rename", "shutil.rmtree", "os.remove", "os.rmdir"}


def put(root, value, step):
    return save(root, step, [Fragment("w", (1000,), (0,), torch.full((1000,), float(value)))], config={}, state={"value": value})


def die_at(event_number, root):
    """SIGKILL this process at its n-th use of the file system under ``root``."""
    left = event_number

    def hook(event, arguments):
        nonlocal left
        if event in EVENTS and arguments and str(arguments[0]).startswith(str(root)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_child(function):
    """Run in a forked child; returns the signal that ended it (0: none)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_everywhere(folder, new_step):
    """Beside a step 1, die at every event of saving ``new_step`` (1: a replacement); returns one entry a kill."""
    first, lines = Path(folder) / f"first_{new_step}", []
    put(first, 1, 1)
    for number in range(1, 100):
        root = Path(folder) / f"{new_step}_{number}"
        shutil.copytree(first, root)

        def dying(number=number, root=root):
            die_at(number, root)
            put(root, 2, new_step)

        ended_by = in_child(dying)
        newest = open_checkpoint(latest(root))
        newest.verify()
        value = newest.read_tensor("w").unique().tolist()
        put(root, 3, new_step)
        after = open_checkpoint(latest(root)).state["value"]
        prune(root, 1, stale_seconds=-1)
        lines.append([ended_by, newest.state["value"], value, after, [p.name for p in root.iterdir()]])
        if not ended_by:
            break
    return lines


def kill_in_the_middle_of_a_file(folder):
    """Die by SIGXFSZ while the data are being written, as if the node went down with part of a file on the disk."""
    root = Path(folder) / "middle"
    put(root, 1, 1)

    def dying():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        put(root, 2, 2)

    ended_by = in_child(dying)
    (partial,) = root.glob("step_2.tmp-*/rank_00000.safetensors")
    return [ended_by, partial.stat().st_size, open_checkpoint(latest(root)).state["value"]]


def kill_all(folder):
    """Everything that forks, in one process."""
    outcomes = {"new": kill_everywhere(folder, 2), "replaced": kill_everywhere(folder, 1), "middle": kill_in_the_middle_of_a_file(folder)}
    print(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What ``kill_all`` saw, run in a clean process: pytest's own may hold threads, which no fork survives."""
    call = f"from tests.unit.test_checkpoint_kill import kill_all; kill_all({str(tmp_path_factory.mktemp('kill'))!r})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(lines, step):
    *kills, last = lines
    assert len(kills) >= 8 and all(kill[0] == signal.SIGKILL for kill in kills) and last[0] == 0 and last[1] == 2
    seen = [line[1] for line in lines]
    assert seen == sorted(seen) and set(seen) == {1, 2}  # the old one, and from the last rename on the new one
    for _, value, read, after, names in lines:
        assert read == [value] and after == 3 and names == [f"step_{step}"]


def test_kill_while_saving_a_new_step(outcomes):
    check(outcomes["new"], 2)


def test_kill_while_replacing_a_step(outcomes):
    check(outcomes["replaced"], 1)


def test_kill_in_the_middle_of_a_file(outcomes):
    assert outcomes["middle"] == [signal.SIGXFSZ, 2000, 1]


def _one_of_two_dies(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 1:
        die_at(2, folder)
    try:
        save(f"{folder}/c", 2, [Fragment("w", (2, 4), (rank, 0), torch.ones(1, 4))], config={}, state={})
    except RuntimeError as error:
        Path(folder, "error").write_text(str(error))
    os._exit(0)  # the group is broken: nothing to take down in order


def test_one_of_two_ranks_is_killed(tmp_path):
    put(tmp_path / "c", 1, 1)
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_one_of_two_dies, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
    assert (tmp_path / "error").exists()
    assert latest(tmp_path / "c").name == "step_1" and not (tmp_path / "c" / "step_2").exists()
