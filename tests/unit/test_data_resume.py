"""Interrupted and shared-out sharding ends in the bytes of one uninterrupted run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swax_megatron.data.shards import ShardedDataset
from tests.texts import run_shard, small_tokenizer, texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--shard-size", "300K", "--segment-bytes", "150K", "--validation-fraction", "0.1", "--deduplicate")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """(inputs, tokenizer, digests of the data set that one process makes of them): duplicates, text files, gzip."""
    import gzip

    folder = tmp_path_factory.mktemp("corpus")
    inputs = folder / "inputs"
    inputs.mkdir()
    documents = texts(4000, seed=5)
    write_jsonl(inputs / "a.jsonl", [*documents, *documents[:500]])
    lines = write_jsonl(folder / "b", [*texts(2500, seed=6), *documents[1000:1100]]).read_bytes()
    (inputs / "b.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    for number, text in enumerate(texts(300, seed=7)):
        (inputs / f"{number:03d}.txt").write_text(text)
    model = small_tokenizer(folder)
    assert run_shard(inputs, model, folder / "whole", *OPTIONS) == 0
    return inputs, model, digests(folder / "whole")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(corpus: tuple, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--input", str(corpus[0]), "--tokenizer", str(corpus[1])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--out", str(out), *OPTIONS, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(out: Path) -> set[str]:
    folder = out.with_name(f"{out.name}.work") / "segments"
    return {path.name for path in folder.iterdir() if ".tmp-" not in path.name} if folder.is_dir() else set()


# runs shard.py until its main process's operation number COUNT on a file whose name holds FRAGMENT, and is killed right before it
KILLED = """
import os, runpy, signal, sys
fragment, left, main = sys.argv[1], int(sys.argv[2]), os.getpid()
def hook(event, arguments):
    global left
    if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        if os.getpid() == main and any(fragment in str(each) for each in arguments[:2]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[3:]
sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PHASES = {"/segments/": 150, "/repeats/": 12, "/joined/": 8, "/result": 5, "published.json": 0}  # most operations before the kill


def kill(corpus: tuple, out: Path, source: random.Random, last: bool) -> str:
    """One SIGKILL at a moment that ``source`` draws, of a process that was alive; returns in which phase."""
    phase = source.choice(["by what is done", *PHASES])
    if phase == "by what is done":
        process = start(corpus, out, "--workers", "2")
        wanted = len(finished(out)) + source.randint(0, 6)
        while process.poll() is None and len(finished(out)) < wanted and not (out.with_name("out.work") / "repeats").exists():
            time.sleep(0.002)
        process.kill()
    else:
        count = source.randint(0, PHASES[phase])
        if phase == "published.json" and last:
            count = 1  # the data set has its name, and what is left is being removed
        command = [sys.executable, "-c", KILLED, phase, str(count), str(ROOT / "data_prep" / "shard.py"), "--input", str(corpus[0])]
        command += ["--tokenizer", str(corpus[1]), "--out", str(out), *OPTIONS]
        workers = "1" if phase == "/joined/" else str(source.choice([1, 2]))  # with several, others of them join
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, "--workers", workers], env=environment, **pipes)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == -signal.SIGKILL, f"{phase}: the process ended before it was killed: {errors}"
    return phase


def kill_and_finish(corpus: tuple, out: Path, seed: int, kills: int) -> None:
    """SIGKILL at moments spread over the whole run, then finish: same bytes, finished segments are not made again."""
    source = random.Random(seed)
    phases = [kill(corpus, out, source, last=number == kills - 1) for number in range(kills)]
    before = {name: (out.with_name(f"{out.name}.work") / "segments" / name).stat().st_ino for name in finished(out)}
    process = start(corpus, out, "--workers", "2")
    while process.poll() is None:
        now = {name: path.stat().st_ino for name in before if (path := out.with_name(f"{out.name}.work") / "segments" / name).exists()}
        assert all(before[name] == inode for name, inode in now.items())
        time.sleep(0.05)
    assert process.returncode == 0, (phases, process.communicate())
    assert digests(out) == corpus[2], phases
    assert [path.name for path in out.parent.iterdir()] == [out.name], phases


def test_sigkill_at_random_moments_ends_in_the_same_bytes(corpus, tmp_path):
    kill_and_finish(corpus, tmp_path / "out", seed=0, kills=3)


@pytest.mark.parametrize("phase", PHASES)
def test_sigkill_in_every_phase(phase, corpus, tmp_path, monkeypatch):
    source = random.Random(phase)
    monkeypatch.setattr(source, "choice", lambda options: phase if phase in options else "1")
    assert kill(corpus, tmp_path / "out", source, last=True) == phase
    process = start(corpus, tmp_path / "out", "--workers", "2")
    assert process.wait(300) == 0 and digests(tmp_path / "out") == corpus[2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_sigkill_often(corpus, tmp_path, seed):
    kill_and_finish(corpus, tmp_path / "out", seed, kills=4)


def test_sigterm_keeps_finished_segments_and_nothing_that_looks_whole(corpus, tmp_path):
    out = tmp_path / "out"
    process = start(corpus, out, "--workers", "2")
    while not finished(out):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "finished segments are kept" in process.stderr.read()
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["out.work"]


def test_parts_and_merge_are_one_run(corpus, tmp_path, capsys):
    inputs, model, whole = corpus
    for parts in (2, 3):
        out = tmp_path / str(parts)
        for part in range(parts, 0, -1):
            if part == 1:
                assert run_shard(inputs, model, out, *OPTIONS, "--merge") == 2
                assert "run the parts that did not finish again, then --merge" in capsys.readouterr().err
            assert run_shard(inputs, model, out, *OPTIONS, "--part", f"{part}/{parts}") == 0
        assert not out.exists()
        assert run_shard(inputs, model, out, *OPTIONS, "--merge") == 0
        assert digests(out) == whole


def test_work_of_other_options_is_refused(corpus, tmp_path, capsys):
    inputs, model, _ = corpus
    assert run_shard(inputs, model, tmp_path / "out", *OPTIONS, "--part", "1/40") == 0
    assert run_shard(inputs, model, tmp_path / "out", "--shard-size", "1M") == 2
    assert "holds the unfinished work of a command with other options (deduplicate, " in capsys.readouterr().err


def test_a_killed_worker_is_an_error_and_its_work_is_done_again(corpus, tmp_path):
    import psutil

    out = tmp_path / "out"
    process = start(corpus, out, "--workers", "2")
    while len(finished(out)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: a tokenising process died" in errors
    assert run_shard(corpus[0], corpus[1], out, *OPTIONS) == 0
    assert digests(out) == corpus[2]


def test_the_workers_of_a_killed_process_end(corpus, tmp_path):
    import psutil

    out = tmp_path / "out"
    process = start(corpus, out, "--workers", "2")
    while len(finished(out)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=60)[1]


def test_an_interruption_after_the_rename_is_noticed(corpus, tmp_path, monkeypatch, capsys):
    from data_prep.workfolder import WorkFolder

    inputs, model, whole = corpus
    out = tmp_path / "out"

    def stop(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "remove", stop)
        assert run_shard(inputs, model, out, *OPTIONS) == 130
    assert out.with_name("out.work").exists() and digests(out) == whole
    assert run_shard(inputs, model, out, *OPTIONS) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and digests(out) == whole


@pytest.mark.parametrize("change", ["another input", "another file", "another option"])
def test_another_command_after_the_rename_does_its_own_work(change, tmp_path, model, monkeypatch, capsys):
    """What an interrupted run left may not answer for another run."""
    from data_prep.workfolder import WorkFolder

    source, out = write_jsonl(tmp_path / "a.jsonl", texts(20)), tmp_path / "out"

    def stop(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "remove", stop)
        assert run_shard(source, model, out) == 130
    options: tuple[str, ...] = ("--overwrite",)
    if change == "another input":
        source = write_jsonl(tmp_path / "b.jsonl", texts(30))
    elif change == "another file":
        write_jsonl(source, texts(30))
    else:
        options += ("--min-text-bytes", "200")
    assert run_shard(source, model, out, *options) == 0
    documents = ShardedDataset(out).documents
    assert f"train {documents} documents" in capsys.readouterr().out
    assert documents == (sum(len(text.encode()) >= 200 for text in texts(20)) if change == "another option" else 30)
    assert not out.with_name("out.work").exists()


def test_work_on_other_inputs_is_refused(tmp_path, model, capsys):
    first, second = (write_jsonl(tmp_path / name, texts(20)) for name in ("a.jsonl", "b.jsonl"))
    assert run_shard(first, model, tmp_path / "out", "--part", "1/1") == 0
    assert run_shard(second, model, tmp_path / "out") == 2
    assert "holds the unfinished work of a command with other options (input)" in capsys.readouterr().err
    assert run_shard(first, model, tmp_path / "out") == 0


def test_duplicates_the_first_stays(corpus, tmp_path):
    inputs, model, _ = corpus
    assert run_shard(inputs, model, tmp_path / "out", *OPTIONS) == 0
    sets = [ShardedDataset(tmp_path / "out" / split) for split in ("train", "validation")]
    assert sets[0].documents + sets[1].documents == 4000 + 2500 + 300
    assert [each.manifest["skipped"]["duplicate"] for each in sets] == [600, 600]  # counted over both
