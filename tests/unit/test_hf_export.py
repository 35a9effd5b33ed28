"""From a checkpoint to a folder that a stranger's transformers loads, and everything that is refused on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from swax_megatron.checkpoint.store import open_checkpoint
from swax_megatron.config import from_dict
from swax_megatron.hf import export
from swax_megatron.hf.export import export_model, find_checkpoint, main, parse_size
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.names import hf_names
from swax_megatron.hf.shards import Planned, plan_shards, write_shards
from swax_megatron.hf.targets import swax_config
from swax_megatron.model.pattern import parse_pattern
from tests.texts import small_tokenizer
from tests.unit.hf_checkpoints import PADDED, VOCABULARY, checkpoint_of, random_weights, raw_config, write_data
from tests.unit.hf_reference import reference_logits, tokens
from tests.unit.hf_training import random_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def reference(raw: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    config = from_dict(raw)
    cut = {n: w[:VOCABULARY] if w.shape[0] == PADDED else w for n, w in weights.items()}
    rows = [reference_logits(swax_config(config, bos=1, eos=2), cut, parse_pattern(config.model.pattern), row) for row in ids]
    return torch.stack(rows)


STRANGER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "swax_megatron":
            raise ImportError(name + " is not for the exported model")

sys.meta_path.insert(0, Refuse())
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

def use(folder, ids):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["a b", "def f(x): return x"], return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
        text = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        same = torch.equal(again(torch.tensor(ids)).logits, logits)
    return {
        "foreign": [name for name in ("swax_megatron", "megatron") if name in sys.modules],
        "logits": logits.tolist(), "again": same, "dtype": str(model.dtype), "window": config.sliding_window,
        "generated": list(text.shape), "eos": model.generation_config.eos_token_id, "pad": model.generation_config.pad_token_id,
        "class": type(model).__module__, "ids": tokenizer("def </s> f")["input_ids"],
        "gate": str(model.model.layers[0].mixer.fgate_proj.weight.dtype),
    }

print(json.dumps([use(folder, json.loads(sys.argv[1])) for folder in sys.argv[2:]]))
"""


def load_elsewhere(folders: list[Path], ids: torch.Tensor, tmp_path: Path) -> list[dict]:
    """Load in a fresh process that cannot import this project, in another directory, with an empty cache."""
    root = Path(export.__file__).parents[2]
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != root]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", STRANGER, json.dumps(ids.tolist()), *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "wish to run" not in done.stdout  # no question is asked
    return json.loads(done.stdout.splitlines()[-1])


def test_a_stranger_loads_the_export(tmp_path, tokenizer):
    """fp32 with its own head, and bf16 with tied embeddings, both in several files."""
    ids = tokens(2, 30)
    cases = []
    for dtype, tied in (("fp32", False), ("bf16", True)):
        raw = raw_config("MSF", model={**raw_config()["model"], "tie_embeddings": tied})
        weights = random_weights(raw)
        checkpoint = open_checkpoint(checkpoint_of(tmp_path / dtype / "checkpoints", raw, weights))
        out = export_model(checkpoint, tmp_path / "exports" / dtype, dtype=dtype, max_shard_bytes=60_000, tokenizer=tokenizer)
        cases.append((dtype, tied, raw, weights, out))
    for (dtype, tied, raw, weights, out), got in zip(cases, load_elsewhere([c[-1] for c in cases], ids, tmp_path), strict=True):
        if dtype == "bf16":
            weights = {n: w if "igate" in n or "fgate" in n else w.bfloat16().float() for n, w in weights.items()}
        want = reference(raw, weights, ids)
        difference = (torch.tensor(got["logits"]).double() - want).abs()
        assert difference.max() < 1e-3 if dtype == "fp32" else difference.median() < 0.02 * want.std()
        assert got["foreign"] == []
        assert got["again"] and got["window"] == 6 and got["generated"][0] == 2
        assert (got["eos"], got["pad"], got["gate"]) == (2, 2, "torch.float32")
        assert got["dtype"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
        assert got["class"].startswith("transformers_modules.") and 2 not in got["ids"]
        check_files(out, tied, tmp_path)
    assert [path.name for path in out.parent.iterdir() if "tmp" in path.name] == []


def check_files(out: Path, tied: bool, tmp_path: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and all((out / file).stat().st_size < 65_000 for file in files)
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    assert index["metadata"]["total_size"] == sum(prod(t.shape) * t.element_size() for f in files for t in load_file(out / f).values())
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "sliding_attention", "full_attention"]
    assert config["rope_layer_types"] == ["sliding_attention"] and config["auto_map"]["AutoConfig"] == "configuration_swax.SwaxConfig"
    card = (out / "README.md").read_text()
    assert "license: unknown" in card and "7 of 10" in card and "4,242" in card and str(tmp_path) not in card


def test_weights_are_the_stored_ones_bit_by_bit(tmp_path, tokenizer):
    raw = raw_config("MS")
    weights = random_weights(raw)
    checkpoint = open_checkpoint(checkpoint_of(tmp_path / "checkpoints", raw, weights))
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stored = load_file(export_model(checkpoint, tmp_path / dtype, dtype=dtype, tokenizer=tokenizer) / "model.safetensors")
        assert set(stored) == set(hf_names("MS", tied=False).values())
        for training, name in hf_names("MS", tied=False).items():
            wanted = weights[training][:VOCABULARY] if weights[training].shape[0] == PADDED else weights[training]
            fp32 = "igate_proj" in name or "fgate_proj" in name
            assert torch.equal(stored[name], wanted if fp32 else wanted.to(kind))


def test_the_training_model_gives_the_same_logits(tmp_path, tokenizer, workers):
    """megatron's model, saved and exported: the whole chain of names, layouts and conventions."""
    raw = raw_config("MSFM")
    raw |= {"run_dir": str(tmp_path / "run"), "kernels": {"backend": "reference", "mlstm_chunk": 16}}
    raw |= {"train": {**raw["train"], "global_batch_size": 1}, "optimizer": {"warmup": 1}}
    raw["data"] |= {"train": [{"path": str(write_data(tmp_path, tokenizer))}]}
    raw["validation"] = {"interval": 0}
    ids = tokens(2, 64)
    (logits,) = workers(1).run(random_checkpoint, raw, str(tmp_path / "run" / "checkpoints"), ids.tolist())
    assert main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--license", "mit"]) == 0
    model = SwaxForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        got = model(ids).logits
    assert got.std() > 0.3
    torch.testing.assert_close(got, torch.tensor(logits), atol=5e-4, rtol=0)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_every_wrong_parameter_is_named(tmp_path, tokenizer):
    raw, weights = raw_config("MS"), random_weights(raw_config("MS"))
    del weights["decoder.layers.0.self_attention.igate_proj.bias"], weights["decoder.final_layernorm.weight"]
    weights["decoder.layers.1.self_attention.q_proj.weight"] = torch.zeros(32, 31)
    weights["output_layer.weight"] = torch.zeros(VOCABULARY, 32)
    weights["decoder.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
    checkpoint = open_checkpoint(checkpoint_of(tmp_path / "checkpoints", raw, weights))
    with pytest.raises(ValueError) as error:
        export_model(checkpoint, tmp_path / "exports" / "out", tokenizer=tokenizer)
    for part in (
        "layers.0.self_attention.igate_proj.bias is missing",
        "final_layernorm.weight is missing",
        "layers.1.self_attention.q_proj.weight is (32, 31), not (32, 32)",
        "output_layer.weight is (400, 32), not (512, 32)",
        "layers.2.mlp.up_proj.weight is unknown",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "exports").exists()


@pytest.fixture
def run(tmp_path) -> Path:
    raw = raw_config("M")
    checkpoint_of(tmp_path / "run" / "checkpoints", raw, random_weights(raw))
    return tmp_path / "run"


def refused(capsys, *arguments: object) -> str:
    """Standard error of a refused command line: exit status 2 and one sentence."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    return error


def test_existing_folders(run, tmp_path, tokenizer, capsys):
    out = tmp_path / "out"
    command = ["--checkpoint", run, "--tokenizer", tokenizer, "--out", out]
    assert main([str(argument) for argument in command]) == 0
    before = (out / "config.json").stat().st_ino
    assert "exists already" in refused(capsys, *command)
    assert (out / "config.json").stat().st_ino == before
    assert main([*map(str, command), "--overwrite"]) == 0
    assert (out / "config.json").stat().st_ino != before
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "something else" in refused(capsys, *command[:-1], other, "--overwrite")
    assert (other / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious", "run"]


def test_a_failed_overwrite_keeps_the_old_export(run, tmp_path, tokenizer, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["--checkpoint", str(run), "--tokenizer", str(tokenizer), "--out", str(out)]
    assert main(command) == 0
    monkeypatch.setattr(export, "MODEL_FILES", ("absent.py",))
    refused(capsys, *command, "--overwrite")
    assert (out / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_wrong_tokenizers(run, tmp_path, tokenizer, capsys):
    command = ["--checkpoint", run, "--out", tmp_path / "out"]
    assert "names no tokenizer" in refused(capsys, *command)
    assert "is no file here" in refused(capsys, *command, "--tokenizer", tmp_path / "absent.model")
    raw = raw_config("M", model={**raw_config("M")["model"], "vocab_size": 300})
    global_padded = {n: w[:384] if w.shape[0] == PADDED else w for n, w in random_weights(raw_config("M")).items()}
    small = checkpoint_of(tmp_path / "small", raw, global_padded)
    assert "has 400 ids, the model 300" in refused(capsys, "--checkpoint", small, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    data = write_data(tmp_path, tokenizer)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b"\x7a\x00")  # one more empty field of the protobuf
    raw = raw_config("M", data={"sequence_length": 64, "train": [{"path": str(data)}]})
    trained = checkpoint_of(tmp_path / "trained", raw, random_weights(raw))
    assert "not the tokenizer that wrote" in refused(capsys, "--checkpoint", trained, "--out", tmp_path / "out", "--tokenizer", other)
    assert not (tmp_path / "out").exists()
    assert main(["--checkpoint", str(trained), "--out", str(tmp_path / "out")]) == 0  # found beside the training data


def test_incomplete_and_damaged_checkpoints(run, tmp_path, tokenizer, capsys):
    command = ["--checkpoint", run, "--out", tmp_path / "out", "--tokenizer", tokenizer]
    step = run / "checkpoints" / "step_7"
    weights = next(step.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert "sha256" in refused(capsys, *command)
    (step / "COMPLETE").unlink()
    assert "no complete checkpoint" in refused(capsys, *command)
    assert "no complete checkpoint" in refused(capsys, "--checkpoint", step, *command[2:])
    assert "no complete checkpoint" in refused(capsys, "--checkpoint", tmp_path / "nowhere", *command[2:])
    assert not (tmp_path / "out").exists()


def test_the_newest_complete_checkpoint_is_found(run):
    raw = raw_config("M")
    newest = checkpoint_of(run / "checkpoints", raw, random_weights(raw), step=30)
    broken = checkpoint_of(run / "checkpoints", raw, random_weights(raw), step=100)
    (broken / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="step_100 .*COMPLETE is missing.*move it away"):
        find_checkpoint(run)
    broken.rename(run / "away")
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == newest
    assert find_checkpoint(run / "checkpoints" / "step_7").name == "step_7"


# -------------------------------------------------------------------------------------------------------------- shards


def test_shards_hold_one_tensor_in_memory(tmp_path):
    planned = {f"t{i}": Planned((100, 10 + i), torch.float32) for i in range(12)}
    alive: list[weakref.ref] = []
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.full(planned[name].shape, float(name[1:]))
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    written: list[int] = []
    write_shards(tmp_path, planned, read, 20_000, written.append)
    assert most <= 2  # the one before may live until the next has been read
    assert sum(written) == sum(tensor.bytes for tensor in planned.values())
    for file, names in plan_shards(planned, 20_000).items():
        with safe_open(tmp_path / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert sorted(handle.keys()) == sorted(names)
            assert all((handle.get_tensor(name) == float(name[1:])).all() for name in names)


def test_plan_keeps_order_and_size():
    planned = {name: Planned((size,), torch.bfloat16) for name, size in (("a", 50), ("b", 40), ("c", 11), ("big", 500), ("d", 1))}
    assert list(plan_shards(planned, 200).values()) == [["a", "b"], ["c"], ["big"], ["d"]]
    assert list(plan_shards(planned, 10**6)) == ["model.safetensors"]


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("150KB", 150_000), ("4096", 4096), ("1.5GiB", 3 << 29), ("2G", 2 * 10**9)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-1GB", "2XB"])
def test_wrong_sizes(text):
    with pytest.raises(Exception, match="no size"):
        parse_size(text)
