"""Copies elsewhere, on real fsspec file systems; milestones; diff and reshard; what a hostile folder can do (nothing)."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from swax_megatron.checkpoint import remote as remote_module
from swax_megatron.checkpoint.__main__ import main
from swax_megatron.checkpoint.folder import doomed_steps, list_checkpoints, prune
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.remote import Remote
from swax_megatron.checkpoint.store import Fragment, latest, open_checkpoint, save
from swax_megatron.errors import RunError
from tests import runs

ALONE = Ranks(0, 1)
W = torch.arange(35, dtype=torch.float32).reshape(7, 5)


def put(root: Path, step: int, value: float = 0.0) -> Path:
    fragments = [
        Fragment("param.w", (7, 5), (0, 0), W[:3] + value),
        Fragment("param.w", (7, 5), (3, 0), W[3:] + value),
        Fragment("param.b", (2,), (0,), torch.ones(2, dtype=torch.bfloat16)),
        Fragment("count", (), (), torch.tensor(3)),
    ]
    return save(root, step, fragments, config={"a": {"b": step}}, state={}, rank_state={"rng": torch.arange(4, dtype=torch.uint8)})


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "file":
        yield f"file://{tmp_path}/far/run"
        return
    yield f"memory://{tmp_path.name}/run"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_PAUSE", 0.0)


def test_there_and_back(url: str, tmp_path: Path) -> None:
    remote = Remote(url)
    remote.check_writable()
    assert remote.steps() == []
    for step in (1, 2, 10):
        remote.upload(put(tmp_path / "near", step), ALONE)
    assert remote.steps() == [1, 2, 10] and remote.open(10).config == {"a": {"b": 10}}
    assert remote.verify(10) == sum(entry["bytes"] for entry in remote.open(10).files.values())
    fetched = remote.download(10, tmp_path / "back", ALONE)
    assert fetched == latest(tmp_path / "back") and os.listdir(tmp_path / "back") == ["step_10"]
    for path in fetched.iterdir():
        assert path.read_bytes() == (tmp_path / "near" / "step_10" / path.name).read_bytes()
    assert remote.prune(1, 2) == [1] and remote.steps() == [2, 10]
    remote.upload(put(tmp_path / "near", 10, 1.0), ALONE)  # after a rewind
    assert remote.verify(10) and remote.steps() == [2, 10]


def test_damage_far_away_is_found(url: str, tmp_path: Path) -> None:
    remote = Remote(url)
    remote.upload(put(tmp_path / "near", 1), ALONE)
    files, root = remote._fs, remote._path(1)
    content = bytearray(files.cat_file(f"{root}/rank_00000.safetensors"))
    content[-1] ^= 1
    files.pipe_file(f"{root}/rank_00000.safetensors", bytes(content))
    with pytest.raises(ValueError, match="rank_00000.safetensors has another sha256"):
        remote.verify(1)
    with pytest.raises(RunError, match="step_1 could not be fetched .*another sha256"):
        remote.download(1, tmp_path / "back", ALONE)
    assert list((tmp_path / "back").iterdir()) == [], "nothing half-fetched stays"
    files.rm_file(f"{root}/rank_00000.safetensors")
    with pytest.raises(ValueError, match="rank_00000.safetensors is missing"):
        remote.verify(1)
    files.pipe_file(f"{root}/manifest.json", b"{}")
    assert remote.steps() == []
    with pytest.raises(ValueError, match="step_1 is damaged.*move it away"):
        remote.newest()
    assert remote.newest(above=1) == -1
    with pytest.raises(RunError, match="no complete checkpoint"):
        remote.download(1, tmp_path / "back", ALONE)


def test_an_upload_that_breaks_off_is_not_complete(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after the first file, and once a file that does not read back: no COMPLETE, the older one of that step is gone too."""
    remote = Remote(url)
    path = put(tmp_path / "near", 1)
    remote.upload(path, ALONE)
    real = remote._fs.put_file

    def broken(source: str, target: str, **named: Any) -> None:
        if source.endswith("_state.safetensors"):
            raise ConnectionError("cut off")
        real(source, target, **named)

    monkeypatch.setattr(type(remote._fs), "put_file", lambda self, *a, **k: broken(*a, **k))
    with pytest.raises(RunError, match="step_1 was not copied .*ConnectionError: cut off"):
        remote.upload(path, ALONE)
    assert remote.steps() == []
    monkeypatch.undo()
    monkeypatch.setattr(remote_module, "_PAUSE", 0.0)
    attempts = []

    def once(self: Any, source: str, target: str, **named: Any) -> None:
        attempts.append(source)
        if len(attempts) == 1:
            raise ConnectionError("for a moment")
        real(source, target, **named)

    monkeypatch.setattr(type(remote._fs), "put_file", once)
    remote.upload(path, ALONE)
    assert len(attempts) == 3 and remote.steps() == [1] and remote.verify(1)


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint.remote='nowhere://x': fsspec cannot reach it"):
        Remote("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Remote(f"file://{tmp_path}/file/below").check_writable()


def test_a_run_continues_from_the_remote_copy_when_the_local_one_is_gone(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Two ranks save in the background and copy; the run directory is lost; the run goes on with the same losses, and says where from."""
    far = {"interval": 2, "remote": f"file://{tmp_path}/far", "keep_last": 1, "keep_every": 4}
    raw = runs.small_config(corpus, tmp_path / "run", train={"steps": 6}, checkpoint=far)
    whole = workers(2).run(runs.train, raw)[0]
    assert Remote(far["remote"]).steps() == [4, 6] and Remote(far["remote"]).verify(4)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_4", "step_6"]
    shutil.rmtree(tmp_path / "run")
    Remote(far["remote"]).remove(6)
    resumed = workers(2).run(runs.train, raw)[0]
    assert resumed["first_step"] == [4.0] and resumed["loss/train"] == whole["loss/train"][4:]
    assert Remote(far["remote"]).steps() == [4, 6]


def test_retention_by_count_and_by_milestone(tmp_path: Path) -> None:
    assert doomed_steps([1, 2, 3, 4, 5], 2) == [1, 2, 3] and doomed_steps([1, 2, 3, 4, 5], 0) == []
    assert doomed_steps([5, 10, 15, 20, 25], 1, 10) == [5, 15] and doomed_steps([0, 3], 1, 10) == []
    with pytest.raises(ValueError, match="keep_every=-1"):
        doomed_steps([], 1, -1)
    for step in (5, 10, 15, 20, 25):
        put(tmp_path, step)
    prune(tmp_path, 1, 10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_10", "step_20", "step_25"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    near, far = tmp_path / "near", f"file://{tmp_path}/far"
    for step in (1, 2):
        put(near / "checkpoints", step)
    for step in (1, 2):
        assert main(["copy", str(near / "checkpoints" / f"step_{step}"), far]) == 0
    capsys.readouterr()
    assert main(["list", far]) == 0 and capsys.readouterr().out.count("complete") == 2
    assert main(["verify", far]) == 0 and "step_2: 2 files" in capsys.readouterr().out
    assert main(["show", f"{far}/step_1", "--tensors"]) == 0 and "step: 1" in capsys.readouterr().out
    assert main(["copy", f"{far}/step_1", str(tmp_path / "back")]) == 0
    assert main(["diff", str(tmp_path / "back"), str(near / "checkpoints" / "step_1")]) == 0
    capsys.readouterr()
    put(tmp_path / "other", 2, 0.5)
    assert main(["diff", str(near), str(tmp_path / "other")]) == 1
    assert "param.w: 35 of 35 elements differ, by 0.5 at most" in capsys.readouterr().out
    assert main(["prune", far, "--keep-last", "1"]) == 0 and capsys.readouterr().out == "removed step_1\n"
    assert main(["diff", far, str(near)]) == 2 and "bring it here first" in capsys.readouterr().err
    assert main(["copy", str(near), str(tmp_path)]) == 2 and main(["list", "nowhere://x"]) == 2


@pytest.mark.parametrize("files", [1, 2, 5, 9])
def test_reshard(files: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same tensors in another number of files; nothing differs."""
    path = put(tmp_path / "a", 3)
    assert main(["reshard", str(path), str(tmp_path / "b"), "--files", str(files)]) == 0
    written = open_checkpoint(tmp_path / "b" / "step_3")
    assert written.verify() == [] and torch.equal(written.read_tensor("param.w"), W)
    filled = {1: 1, 2: 2, 5: 5, 9: 3}[files]  # nine files are more than any of the three tensors has rows: each lies whole in one
    assert len([name for name in written.files if "state" not in name]) == filled
    assert torch.equal(written.rank_state(0)["rng"], torch.arange(4, dtype=torch.uint8))
    assert main(["diff", str(path), str(tmp_path / "b")]) == 0
    assert main(["reshard", str(path), str(tmp_path / "a"), "--files", "1"]) == 2
    assert main(["reshard", str(path), str(tmp_path / "c"), "--files", "0"]) == 2 and not (tmp_path / "c").exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


HOSTILE = ["optimizer.pt", "data.pkl", ".metadata", "sitecustomize.py", "conftest.py"]


def test_a_checkpoint_from_someone_else_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Pickles and scripts in the folder are named and never opened; a pickle in the place of a data file is refused even where
    manifest and marker were made to fit it; a header that claims more than the file is refused.
    """
    path = put(tmp_path / "near", 1)
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(str(sprung)))
    for name in HOSTILE:
        (path / name).write_bytes(trap if not name.endswith(".py") else f"open({str(sprung)!r}, 'w')".encode())
    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple) -> None:
        if watching and event in ("open", "import", "exec") and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    assert main(["verify", str(path)]) == 0
    told = capsys.readouterr().err
    assert all(f"{name} does not belong to the checkpoint" in told for name in HOSTILE)
    assert torch.equal(open_checkpoint(path).read_tensor("param.w"), W)
    file = path / "rank_00000.safetensors"
    whole = file.read_bytes()
    huge = (1 << 40).to_bytes(8, "little") + whole[8:]
    beyond = whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
    for content in (trap, trap + bytes(len(whole) - len(trap)) if len(trap) < len(whole) else trap, huge, beyond):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="rank_00000.safetensors has"):
            open_checkpoint(path).verify()
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["rank_00000.safetensors"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        text = json.dumps(manifest).encode()
        (path / "manifest.json").write_bytes(text)
        (path / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())
        target = torch.full((7, 5), 4.0)
        with pytest.raises(ValueError, match="rank_00000.safetensors"):
            open_checkpoint(path).read_into([Fragment("param.w", (7, 5), (0, 0), target)])
        assert (target == 4.0).all()
    watching = False
    assert not sprung.exists(), "code of the checkpoint ran"
    assert not [name for name in opened if os.path.basename(name) in HOSTILE], "a foreign file was opened"
