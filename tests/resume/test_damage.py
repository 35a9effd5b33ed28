"""What a run does about damage: refuses on every rank, by name, before any weight is touched; never takes an older checkpoint, or none,
in place of a damaged one; and never ends for a copy or a deletion that failed after a good save.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swax_megatron.checkpoint import remote as remote_module
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.remote import Remote
from swax_megatron.checkpoint.store import list_checkpoints
from swax_megatron.errors import RunError
from tests import runs
from tests.faults import jobs
from tests.unit.test_checkpoint_store import empty, flip


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory, workers: Any) -> dict[str, Any]:
    """The configuration of a run of two ranks that saved steps 2 and 4."""
    raw = jobs.config(corpus, tmp_path_factory.mktemp("damage") / "run", steps=4, interval=2, window={"anneal_fraction": 0.0})
    workers(2).run(runs.train, raw)
    return raw


def copy_of(saved: dict[str, Any], run_dir: Path, steps: tuple[int, ...]) -> dict[str, Any]:
    for step in steps:
        shutil.copytree(Path(saved["run_dir"]) / "checkpoints" / f"step_{step}", run_dir / "checkpoints" / f"step_{step}")
    return {**saved, "run_dir": str(run_dir)}


def state_of(trainer: Any) -> list[torch.Tensor]:
    """This rank's weights, masters and moments, copied."""
    weights = [parameter.detach().clone() for chunk in trainer.backend.chunks for parameter in chunk.parameters()]
    return weights + [fragment.tensor.detach().clone() for fragment in trainer.backend.fragments(saving=False)]


def refusal(trainer: Any, action: Callable[[], Any]) -> tuple[str, bool]:
    """The sentence of the ValueError that an action ends with, and whether it changed anything of this rank."""
    before, state = state_of(trainer), trainer.state
    text = ""
    try:
        action()
    except ValueError as error:
        text = str(error)
    same = all(torch.equal(a, b) for a, b in zip(state_of(trainer), before, strict=True))
    return text, same and trainer.state == state


def resumes(raws: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Of each run directory what its resume is refused with."""
    from swax_megatron.build import build_trainer
    from swax_megatron.callbacks.checkpoint import Checkpoints

    found = []
    with runs.layout(raws[0]) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        for raw in raws:
            checkpoints = Checkpoints(raw["run_dir"])
            found.append(refusal(trainer, lambda checkpoints=checkpoints: checkpoints.resume(trainer)))
    return found


HARM = {"flipped": flip, "empty": empty, "gone": os.unlink}


def test_a_damaged_newest_checkpoint_is_refused_on_every_rank(saved: dict[str, Any], tmp_path: Path, workers: Any) -> None:
    """Manifest, marker and data, flipped, emptied or gone, as the only checkpoint and as the newer of two: no rank resumes from the
    older one or starts anew, and no weight, master or moment is touched.
    """
    raws, said = [], []
    for steps in ((4,), (2, 4)):
        for name in ("manifest.json", "COMPLETE", "rank_00001.safetensors"):
            for how, harm in HARM.items():
                raw = copy_of(saved, tmp_path / f"{how} {name} of {len(steps)}", steps)
                harm(Path(raw["run_dir"]) / "checkpoints" / "step_4" / name)
                raws.append(raw)
                said.append(["step_4", "COMPLETE" if name == "COMPLETE" else name, "move it away to use an older one"])
    for rank in workers(2).run(resumes, raws):
        for (text, untouched), raw, parts in zip(rank, raws, said, strict=True):
            assert all(part in text for part in parts), (raw["run_dir"], text)
            assert untouched, raw["run_dir"]


def test_exit_code(saved: dict[str, Any], tmp_path: Path) -> None:
    """The program, whose only checkpoint has a flipped byte in its manifest, ends with one sentence and code 2, and trains nothing."""
    raw = copy_of(saved, tmp_path / "run", (4,))
    flip(tmp_path / "run" / "checkpoints" / "step_4" / "manifest.json")
    job = jobs.Job(raw, processes=1)
    assert job.ended() == 2 and "error: " in job.text() and "manifest.json is not what was saved" in job.text(), job.text()[-2000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def rewind(raw: dict[str, Any], file: str) -> tuple[str, bool]:
    """Train two steps more, damage the checkpoint to go back to, go back."""
    from swax_megatron.build import build_trainer
    from swax_megatron.callbacks.guard import SpikeGuard

    with runs.layout(raw) as (config, groups):
        trainer, checkpoints = build_trainer(config, groups)
        checkpoints.resume(trainer)
        trainer.fit()
        if groups.rank == 0:
            flip(checkpoints.root / "step_4" / file)
        Ranks.of(groups.cpu).all_gather(None)
        guard = next(callback for callback in trainer.callbacks if isinstance(callback, SpikeGuard))
        step = trainer.state.step - 1
        trainer.state = replace(trainer.state, guard=trainer.state.guard.refused(step - 1).refused(step))
        return refusal(trainer, lambda: guard._rewind(trainer, step))


@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors"])
def test_a_rewind_to_a_damaged_checkpoint_is_refused(file: str, saved: dict[str, Any], tmp_path: Path, workers: Any) -> None:
    raw = copy_of(saved, tmp_path / "run", (2, 4))
    raw["train"] = {**raw["train"], "steps": 6}
    raw["checkpoint"] = {**raw["checkpoint"], "interval": 6, "allow_change": ["train.steps", "optimizer.schedule"]}
    for text, untouched in workers(2).run(rewind, raw, file):
        assert "step_4" in text and file in text and untouched, text
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step_6", "nothing was given up"


def copies(raw: dict[str, Any], far: str, damaged: str) -> dict[str, str]:
    """One rank of two cannot open what is to be copied, or fetched: what each of the ways ends with."""
    from swax_megatron.build import build_trainer

    remote_module._PAUSE = 0.0
    found = {}
    with runs.layout(raw) as (config, groups):
        ranks = Ranks.of(groups.cpu)
        trainer, checkpoints = build_trainer(config, groups)
        good = checkpoints.root / "step_4"
        mine = good if ranks.rank == 0 else Path(damaged) / "checkpoints" / "step_4"

        def attempt(name: str, action: Callable[[], Any]) -> None:
            try:
                action()
                found[name] = "done"
            except (RunError, ValueError) as error:
                found[name] = f"{type(error).__name__}: {error}"

        place = Remote(far)
        attempt("upload", lambda: place.upload(mine, ranks))
        checkpoints._remote = place
        attempt("keep", lambda: checkpoints._keep(mine, ranks, config))
        found["copy failed"] = str(checkpoints._copy_failed)
        attempt("keep again", lambda: checkpoints._keep(good, ranks, config))
        found["copy failed now"] = str(checkpoints._copy_failed)
        here = place if ranks.rank == 0 else Remote(f"{far}/nothing")
        attempt("download", lambda: here.download(4, Path(raw["run_dir"]) / "fetched", ranks))
        found["fetched"] = str([path.name for path in (Path(raw["run_dir"]) / "fetched").glob("*")])
        ranks.all_gather(None)
        if ranks.rank == 0:  # what no deletion of a folder can delete: a file of such a folder's name
            (checkpoints.root / "step_1.deleting-00ff").write_text("")
        attempt("prune", lambda: checkpoints._keep(good, ranks, config))
        ranks.all_gather(None)
        attempt("discard", lambda: checkpoints.discard_after(trainer, 2))
    return found


def test_a_copy_or_deletion_that_fails_on_one_rank(saved: dict[str, Any], tmp_path: Path, workers: Any) -> None:
    """No rank is left waiting, and neither ends a run whose checkpoint was saved."""
    raw = copy_of(saved, tmp_path / "run", (2, 4))
    raw["checkpoint"] = {**raw["checkpoint"], "keep_last": 1}
    flip(Path(copy_of(saved, tmp_path / "damaged", (4,))["run_dir"]) / "checkpoints" / "step_4" / "COMPLETE")
    first, second = workers(2).run(copies, raw, f"file://{tmp_path}/far", str(tmp_path / "damaged"))
    assert {**first, "download": ""} == {**second, "download": ""}  # which names each rank's own place
    assert first["upload"].startswith("RunError: checkpoint step_4 was not copied to file://"), first
    assert "rank 1: " in first["upload"] and "manifest.json is not what was saved" in first["upload"]
    assert (first["keep"], first["copy failed"]) == ("done", "True")
    assert (first["keep again"], first["copy failed now"]) == ("done", "False")
    assert first["download"].startswith("RunError: checkpoint step_4 could not be fetched"), first
    assert "rank 1: " in first["download"] and first["fetched"] == "[]"
    assert (first["prune"], first["discard"]) == ("done", "done")
    assert Remote(f"file://{tmp_path}/far").steps() == []


def test_a_damaged_remote_copy_is_no_new_start(saved: dict[str, Any], tmp_path: Path, workers: Any) -> None:
    """The run directory is lost, and the newest copy's manifest or marker is damaged: refused; a whole run directory counts."""
    raw = copy_of(saved, tmp_path / "whole", (2, 4))
    for step in (2, 4):
        Remote(f"file://{tmp_path}/far").upload(tmp_path / "whole" / "checkpoints" / f"step_{step}", Ranks(0, 1))
    raws = []
    for name in ("manifest.json", "COMPLETE"):
        for how, harm in (("flipped", flip), ("empty", empty)):
            shutil.copytree(tmp_path / "far", tmp_path / f"{how} {name}")
            harm(tmp_path / f"{how} {name}" / "step_4" / name)
            far = {**raw["checkpoint"], "remote": f"file://{tmp_path}/{how} {name}"}
            raws.append({**raw, "run_dir": str(tmp_path / "lost"), "checkpoint": far})
    for raw in raws:
        for text, untouched in (each[0] for each in workers(2).run(resumes, [raw])):
            assert raw["checkpoint"]["remote"] in text and "step_4 is damaged" in text and "move it away" in text and untouched, text
    assert workers(2).run(resumes, [{**raws[0], "run_dir": str(tmp_path / "whole")}])[0][0][0] == ""
