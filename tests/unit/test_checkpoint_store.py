"""One process: what is written reads back bit for bit; every kind of damage is refused by name."""

import hashlib
import json
import logging
import os
import time

import pytest
import torch
from safetensors.torch import load_file

from swax_megatron.checkpoint.__main__ import main
from swax_megatron.checkpoint.folder import newest_step
from swax_megatron.checkpoint.store import (
    Fragment,
    discard_after,
    flat_range_boxes,
    latest,
    list_checkpoints,
    open_checkpoint,
    prune,
    save,
)

W = torch.arange(35, dtype=torch.float32).reshape(7, 5).add(0.1)
B = torch.linspace(-2, 2, 9).to(torch.bfloat16)


def fragments(w=W):
    boxes = [box for cut in ((0, 13), (13, 14), (14, 35)) for box in flat_range_boxes((7, 5), *cut)]
    yield from (Fragment("param.w", (7, 5), box.offsets, w[box.slices()]) for box in boxes)
    yield Fragment("param.b", (9,), (0,), B)
    yield Fragment("count", (), (), torch.tensor(3, dtype=torch.int64))
    yield Fragment("empty", (0, 4), (0, 0), torch.empty(0, 4))


def put(root, step=3, w=W):
    return save(root, step, fragments(w), config={"a": 1}, state={"tokens": 5}, rank_state={"rng": torch.arange(4, dtype=torch.uint8)})


def test_round_trip(tmp_path):
    path = put(tmp_path)
    assert path == tmp_path / "step_3" == latest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_3"]
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.config, checkpoint.state) == (3, {"a": 1}, {"tokens": 5})
    assert checkpoint.keys() == ["param.w", "param.b", "count", "empty"]
    assert checkpoint.shape("param.w") == (7, 5) and checkpoint.dtype("param.b") == torch.bfloat16
    assert torch.equal(checkpoint.read_tensor("param.w"), W) and torch.equal(checkpoint.read_tensor("param.b"), B)
    assert checkpoint.read_tensor("count").item() == 3 and checkpoint.read_tensor("empty").shape == (0, 4)
    assert checkpoint.read_tensor("param.b", torch.float64).dtype == torch.float64
    assert checkpoint.rank_state(0)["rng"].tolist() == [0, 1, 2, 3] and checkpoint.rank_state(1) is None
    assert checkpoint.verify() == []
    assert torch.equal(load_file(path / "rank_00000.safetensors")["param.b@0"], B)  # the library reads what is written here
    with pytest.raises(ValueError, match="no tensor 'nope'"):
        checkpoint.read_tensor("nope")


def test_read_into_strided_parameter(tmp_path):
    checkpoint = open_checkpoint(put(tmp_path))
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    checkpoint.read_into([Fragment("param.w", (7, 5), (2, 1), parameter.t())])
    assert torch.equal(parameter.detach(), W[2:5, 1:3].t())


def test_all_differences_named_before_any_tensor_is_touched(tmp_path):
    checkpoint = open_checkpoint(put(tmp_path))
    good, wrong = torch.zeros(7, 5), torch.zeros(9)
    with pytest.raises(ValueError) as caught:
        checkpoint.read_into(
            [
                Fragment("param.w", (7, 5), (0, 0), good),
                Fragment("param.w2", (7, 5), (0, 0), good),
                Fragment("count", (2,), (0,), torch.zeros(2, dtype=torch.int64)),
                Fragment("param.b", (9,), (0,), wrong),
            ]
        )
    text = str(caught.value)
    assert "param.w2 is not stored" in text and "count is stored as ()" in text and "torch.bfloat16, wanted torch.float32" in text
    assert not good.any()
    checkpoint.read_into([Fragment("param.b", (9,), (0,), wrong)], convert=True)
    assert torch.equal(wrong, B.float())
    with pytest.raises(ValueError, match="no block of shape"):
        Fragment("param.w", (7, 5), (6, 0), torch.zeros(2, 5))


def test_damage(tmp_path):
    path = put(tmp_path)
    file = path / "rank_00000.safetensors"
    whole = file.read_bytes()

    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="rank_00000.safetensors has another sha256"):
        open_checkpoint(path).verify()
    file.write_bytes(whole[:-1])
    for action in (lambda c: c.verify(), lambda c: c.read_tensor("param.w")):
        with pytest.raises(ValueError, match=rf"rank_00000.safetensors has {len(whole) - 1} bytes, not {len(whole)}"):
            action(open_checkpoint(path))
    file.write_bytes(b"\xff" * len(whole))  # the right size, but no safetensors header
    with pytest.raises(ValueError, match="rank_00000.safetensors is damaged"):
        open_checkpoint(path).read_tensor("param.w")
    file.unlink()
    (path / "rank_00000_state.safetensors").unlink()
    with pytest.raises(ValueError, match="rank_00000.safetensors is missing; rank_00000_state.safetensors is missing"):
        open_checkpoint(path).verify()
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="rank_00000_state.safetensors is damaged"):
        open_checkpoint(path).rank_state(0)


def test_foreign_file_is_reported(tmp_path):
    path = put(tmp_path)
    (path / "notes.txt").write_text("mine")
    assert open_checkpoint(path).verify() == ["notes.txt"]


def rewrite(path, change):
    """Edit the manifest and make the marker fit."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


def test_manifest_and_marker(tmp_path):
    put(tmp_path, 2)
    path = put(tmp_path)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"tokens": 5', '"tokens": 6'))
    with pytest.raises(ValueError, match="not what was saved"):
        open_checkpoint(path)
    (path / "manifest.json").write_text(text)
    assert latest(tmp_path) == path
    (path / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="COMPLETE is missing"):
        open_checkpoint(path)
    assert newest_step(tmp_path) == 2 and [p.name for p in list_checkpoints(tmp_path)] == ["step_2"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE"])
@pytest.mark.parametrize("harm", [flip, empty, os.unlink])
@pytest.mark.parametrize("older", [(), (2,)])
def test_a_damaged_newest_checkpoint_is_no_older_one_and_no_new_start(tmp_path, capsys, name, harm, older):
    for step in older:
        put(tmp_path, step)
    path = put(tmp_path)
    harm(path / name)
    with pytest.raises(ValueError, match="/step_3.*move it away to use an older one"):
        latest(tmp_path)
    assert main(["show", str(tmp_path)]) == 2 and f"error: {path}" in capsys.readouterr().err
    assert main(["list", str(tmp_path)]) == 0 and "step_3\tdamaged: " in capsys.readouterr().out
    path.rename(tmp_path / "away")
    assert latest(tmp_path) == (tmp_path / "step_2" if older else None)


def test_an_older_damaged_checkpoint_hinders_nobody(tmp_path):
    flip(put(tmp_path, 2) / "manifest.json")
    newer = put(tmp_path, 3)
    assert latest(tmp_path) == newer


def test_prune_keeps_the_forerunner_of_a_damaged_checkpoint(tmp_path):
    """Killed between the renames, then the new one was damaged: its forerunner is the only whole checkpoint of that step."""
    forerunner = put(tmp_path, 5).rename(tmp_path / "step_5.replaced-00ff")
    flip(put(tmp_path, 5) / "COMPLETE")
    prune(tmp_path, 1)
    assert forerunner.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format_version=99), "format_version 99, newer than"),
        (lambda m: m.pop("tensors"), "lacks a field"),
        (lambda m: m["tensors"]["param.w"]["chunks"].pop(), "param.w: no chunk holds"),
        (lambda m: m["tensors"]["param.b"]["chunks"][0].update(file="../../other.safetensors"), "names the file"),
        (lambda m: m["files"].update({"/etc/passwd": {"sha256": "", "bytes": 1}}), "names the file"),
        (lambda m: m["tensors"]["param.b"].update(dtype="F8"), "unknown dtype"),
        (lambda m: m["tensors"]["param.b"].update(dtype=[]), "lacks a field or holds a wrong type"),
        (lambda m: m.update(format_version=1e999), "format_version is inf, expected a number"),
        (lambda m: m.update(step="x"), "step is 'x', expected a number"),
        (lambda m: m.update(step=True), "step is True, expected a number"),
        (lambda m: m.update(world_size=-1), "world_size is -1, expected a number"),
        (lambda m: m.update(config=[]), r"config is \[\], expected a JSON object"),
        (lambda m: m.update(state=None), "state is None, expected a JSON object"),
        (lambda m: m["files"]["rank_00000.safetensors"].pop("bytes"), "lacks a field.*bytes"),
        (lambda m: m["files"]["rank_00000.safetensors"].update(bytes="many"), "size of rank_00000.safetensors is 'many', expected"),
        (lambda m: m["files"]["rank_00000.safetensors"].update(sha256=7), "sha256 of rank_00000.safetensors is 7, expected"),
        (lambda m: m["files"].update({"rank_00000.safetensors": "x"}), "lacks a field or holds a wrong type"),
        (lambda m: m["tensors"]["param.b"].update(shape="9"), "size of param.b is '9', expected a list"),
        (lambda m: m["tensors"]["param.b"]["chunks"][0].update(sizes=[9.0]), r"size of param.b is \[9.0\], expected a list"),
        (lambda m: m["tensors"]["param.b"]["chunks"][0].update(file=3), "lacks a field or holds a wrong type"),
    ],
)
def test_manifest_that_fits_its_marker_but_is_wrong(tmp_path, change, message):
    path = put(tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_nested_deeply_is_refused(tmp_path, capsys):
    path = put(tmp_path)
    text = b"[" * 200_000
    (path / "manifest.json").write_bytes(text)
    (path / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())
    assert main(["verify", str(path)]) == 2
    assert "is no checkpoint manifest: RecursionError" in capsys.readouterr().err


def test_refused_saves_leave_nothing(tmp_path):
    w = Fragment("w", (4, 4), (0, 0), torch.zeros(2, 4))
    for given, state, message in (
        ([w], {}, r"w: no chunk holds \[2:4, 0:4\]"),
        ([w, Fragment("w", (4, 4), (1, 0), torch.zeros(3, 4))], {}, r"\[0:2, 0:4\] and \[1:4, 0:4\] .* overlap"),
        ([w, w], {}, "two fragments"),
        ([w, Fragment("w", (4, 5), (2, 0), torch.zeros(2, 5))], {}, "w: rank 0 saves"),
        ([Fragment("c", (1,), (0,), torch.zeros(1, dtype=torch.complex64))], {}, "cannot hold torch.complex64"),
        ([], {"x": torch.zeros(1)}, "state is no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path, 1, given, config={}, state=state)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="step=-1"):
        save(tmp_path, -1, [], config={}, state={})


def test_complete_is_replaced_incomplete_is_moved_aside(tmp_path, caplog):
    put(tmp_path)
    put(tmp_path, w=W + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]
    assert torch.equal(open_checkpoint(tmp_path / "step_3").read_tensor("param.w"), W + 1)
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4" / "precious.txt").write_text("keep")
    with caplog.at_level(logging.WARNING):
        put(tmp_path, 4)
    (aside,) = tmp_path.glob("step_4.aside-*")
    assert (aside / "precious.txt").read_text() == "keep" and "no complete checkpoint" in caplog.text
    assert open_checkpoint(tmp_path / "step_4").verify() == []


def test_killed_between_the_renames_of_a_replacement(tmp_path):
    put(tmp_path, 2)
    replaced = put(tmp_path, 5).rename(tmp_path / "step_5.replaced-00ff")
    assert latest(tmp_path) == replaced and open_checkpoint(replaced).step == 5
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [replaced.name]
    put(tmp_path, 5)
    assert latest(tmp_path).name == "step_5"
    prune(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


def test_prune(tmp_path):
    for step in (1, 2, 10, 9):
        put(tmp_path, step)
    old, fresh = tmp_path / "step_11.tmp-0a", tmp_path / "step_12.tmp-0b"
    for folder in (old, fresh, tmp_path / "step_1.tmp-0c.deleting-0d", tmp_path / "step_20", tmp_path / "mine"):
        folder.mkdir()
    (old / "rank_00000.safetensors").write_bytes(b"x")
    past = time.time() - 7200
    for path in (old / "rank_00000.safetensors", old):
        os.utime(path, (past, past))
    with pytest.raises(ValueError, match="keep_last=-1"):
        prune(tmp_path, -1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_1", "step_2", "step_9", "step_10"]
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "step_10", "step_12.tmp-0b", "step_20", "step_9"]
    (tmp_path / "step_20").rmdir()  # incomplete, and latest refuses it
    assert latest(tmp_path).name == "step_10"
    assert prune(tmp_path / "nowhere", 1) == [] and latest(tmp_path / "nowhere") is None


def test_discard_after_a_rewind(tmp_path):
    for step in (1, 2, 3):
        put(tmp_path, step)
    assert [p.name for p in discard_after(tmp_path, 1)] == ["step_3", "step_2"]
    assert latest(tmp_path).name == "step_1"


def test_command_line(tmp_path, capsys):
    root = tmp_path / "checkpoints"
    put(root, 1)
    path = put(root, 2)
    assert main(["list", str(tmp_path)]) == 0 and capsys.readouterr().out.count("complete") == 2
    assert main(["verify", str(tmp_path)]) == 0 and "step_2: 2 files" in capsys.readouterr().out
    assert main(["show", str(path), "--tensors"]) == 0 and "training parameters: 44" in capsys.readouterr().out
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert main(["verify", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint ")
    assert main(["prune", str(tmp_path), "--keep-last", "1"]) == 0 and capsys.readouterr().out == "removed step_1\n"
    assert main(["show", str(tmp_path / "no")]) == 2 and "is no folder" in capsys.readouterr().err
