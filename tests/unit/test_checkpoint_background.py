"""Saves in the background: the same bytes as a save that waits; errors reach everybody in one sentence; nothing half-written."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swax_megatron.checkpoint import background as background_module
from swax_megatron.checkpoint import writer
from swax_megatron.checkpoint.background import BackgroundSaver
from swax_megatron.checkpoint.folder import latest, list_checkpoints
from swax_megatron.checkpoint.mail import Mail
from swax_megatron.checkpoint.snapshot import Snapshot
from swax_megatron.checkpoint.store import Fragment, open_checkpoint, save
from swax_megatron.errors import RunError

SHAPE = (6, 40)


def fragments(rank: int, size: int, value: float) -> list[Fragment]:
    """This rank's rows of a matrix, an odd-sized bf16 vector (alignment) and a scalar on rank 0."""
    rows = SHAPE[0] // size
    matrix = torch.full((rows, SHAPE[1]), value) + torch.arange(rows * SHAPE[1]).view(rows, -1) + 1000 * rank
    found = [Fragment("param.w", SHAPE, (rank * rows, 0), matrix)]
    if rank == 0:
        found.append(Fragment("param.b", (7,), (0,), torch.linspace(0, value, 7).to(torch.bfloat16)))
        found.append(Fragment("count", (), (), torch.tensor(int(value))))
        found.append(Fragment("empty", (0, 3), (0, 0), torch.empty(0, 3)))
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def joined() -> tuple[int, int]:
    """This rank and the size of the pool, which keeps its default group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def both_ways(folder: str) -> list[Any]:
    """On every rank: three saves in the background and the same three that wait; the originals are overwritten at once."""
    rank, size = joined()
    saver, group = BackgroundSaver(60.0), dist.group.WORLD
    memory = []
    for step in range(1, 4):
        shared = {"config": {"a": (1, 2)}, "state": {"step": step}, "rank_state": {"rng": torch.arange(3 + rank)}}
        mine = fragments(rank, size, float(step))
        save(Path(folder, "sync"), step, mine, group=group, **shared)
        saver.start(Path(folder, "async"), step, mine, group=group, **shared)
        saver.copied()
        for fragment in mine:
            fragment.tensor.fill_(-1)  # the next update
        memory.append((saver.snapshot.nbytes, [slab.data_ptr() for slab in saver.snapshot._slabs]))
    assert saver.in_flight
    saver.finish(group)
    assert not saver.in_flight
    return memory


def test_a_background_save_writes_the_same_bytes(workers: Any, tmp_path: Path) -> None:
    for memory in workers(2).run(both_ways, str(tmp_path)):
        assert memory[0] == memory[1] == memory[2], "the host memory is taken once and used again"
    names = sorted(path.name for path in (tmp_path / "async").iterdir())
    assert names == ["step_1", "step_2", "step_3"], "no temporary folder and no mail is left"
    for name in names:
        assert digests(tmp_path / "async" / name) == digests(tmp_path / "sync" / name)
    assert open_checkpoint(tmp_path / "async" / "step_3").verify(ranks_share=False) == []


def one_fails(folder: str, failing: int) -> tuple[str, str]:
    """A fragment of the failing rank is missing, then its disk is full; what every rank is told."""
    rank, size = joined()
    saver, group, told = BackgroundSaver(60.0), dist.group.WORLD, []
    mine = fragments(rank, size, 1.0)
    saver.start(folder, 1, mine, config={}, state={}, group=group)
    saver.start(folder, 2, mine[:0] if rank == failing else mine, config={}, state={}, group=group)
    with pytest.raises(ValueError) as caught:
        saver.finish(group)
    told.append(str(caught.value))
    real = writer.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    writer.write_tensors = full if rank == failing else real
    try:
        saver.start(folder, 3, mine, config={}, state={}, group=group)
        with pytest.raises(RunError) as caught_late:
            saver.start(folder, 4, mine, config={}, state={}, group=group)  # the next save tells of the one before
        told.append(str(caught_late.value))
    finally:
        writer.write_tensors = real
    saver.start(folder, 5, mine, config={}, state={}, group=group)
    saver.finish(group)
    return tuple(told)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_reaches_every_rank_and_leaves_nothing(failing: int, workers: Any, tmp_path: Path) -> None:
    for missing, full in workers(2).run(one_fails, str(tmp_path), failing):
        assert "step_2 was not saved" in missing and "no chunk holds" in missing and "\n" not in missing
        assert f"step_3 was not saved: rank {failing}: OSError: [Errno 28] No space left" in full
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_5"]


def test_what_the_disk_holds_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that flips a bit after the write: never published."""
    saver = BackgroundSaver(1.0)
    saver.start(tmp_path, 1, fragments(0, 1, 1.0), config={}, state={})
    saver.finish()
    real = writer.write_tensors

    def flipping(path: Path, tensors: Any) -> Any:
        entry = real(path, tensors)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return entry

    monkeypatch.setattr(writer, "write_tensors", flipping)
    saver.start(tmp_path, 2, fragments(0, 1, 1.0), config={}, state={})
    with pytest.raises(RunError, match="does not read back as it was written"):
        saver.finish()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_1"]


def test_training_goes_on_while_the_thread_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``start`` returns before a byte is written, and nothing is complete until the thread is through; finish waits for it."""
    gate, real = threading.Event(), background_module.save_among

    def held(*arguments: Any, **named: Any) -> Path:
        assert gate.wait(30)
        return real(*arguments, **named)

    monkeypatch.setattr(background_module, "save_among", held)
    saver, done = BackgroundSaver(1.0), []
    saver.start(tmp_path, 1, fragments(0, 1, 1.0), config={}, state={}, then=lambda path, ranks: done.append((path, ranks.rank)))
    assert saver.in_flight and latest(tmp_path) is None and not done
    gate.set()
    saver.finish()
    assert latest(tmp_path) == tmp_path / "step_1" and done == [(tmp_path / "step_1", 0)]


def test_mail_waits_and_gives_up(tmp_path: Path) -> None:
    """Values arrive whole and in order; a rank that never writes is named."""
    results: dict[int, Any] = {}

    def meet(rank: int) -> None:
        mail = Mail(tmp_path, rank, 3, 20.0)
        first = mail.broadcast({"folder": "x"} if rank == 0 else None)
        results[rank] = (first, mail.gather({"rank": rank}), mail.all_gather([rank, "é"]))

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    gathered = [{"rank": rank} for rank in range(3)]
    assert results == {rank: ({"folder": "x"}, gathered if rank == 0 else None, [[0, "é"], [1, "é"], [2, "é"]]) for rank in range(3)}
    (tmp_path / "alone").mkdir()
    with pytest.raises(RunError, match="no word of rank 1 .* all nodes share"):
        Mail(tmp_path / "alone", 0, 2, 0.05).gather(None)


def test_a_snapshot_larger_than_one_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fragments lie whole in slabs; one that is larger than a slab gets its own; other sizes later reuse what fits."""
    monkeypatch.setattr("swax_megatron.checkpoint.snapshot._SLAB", 1024)
    snapshot = Snapshot()
    sizes = (100, 100, 600, 3, 50)
    for scale in (1.0, 2.0):
        given = [Fragment(f"k{i}", (size,), (0,), scale * torch.arange(size)) for i, size in enumerate(sizes)]
        copies = snapshot.take(given)
        for copy, one in zip(copies, given, strict=True):
            assert torch.equal(copy.tensor, one.tensor) and copy.tensor.data_ptr() != one.tensor.data_ptr()
        assert snapshot.nbytes <= 1024 + 2400 + 1024 + 64
    assert snapshot.take([]) == []
