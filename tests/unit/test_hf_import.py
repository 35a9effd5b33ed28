"""From a Hugging Face folder to a training checkpoint: bit by bit, layer by layer, and everything that is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, xLSTMConfig, xLSTMForCausalLM, xLSTMPreTrainedModel

from swax_megatron.checkpoint.store import Checkpoint, open_checkpoint
from swax_megatron.config import from_dict
from swax_megatron.hf.export import export_model
from swax_megatron.hf.export import main as export_main
from swax_megatron.hf.import_ import main
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.targets import parameter_shapes
from swax_megatron.model.initial import fill, initial_value
from tests.texts import small_tokenizer
from tests.unit.hf_checkpoints import PADDED, VOCABULARY, checkpoint_of, random_weights, raw_config, write_data
from tests.unit.hf_reference import randomise, tokens

EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder, small_tokenizer(folder))


@pytest.fixture(scope="module")
def tokenizer(data) -> Path:
    return data / "tokenizer.model"


def training(data: Path, run_dir: Path, **model) -> dict:
    """How to train, without a model section (or with the given fields)."""
    raw = {
        "run_dir": str(run_dir),
        "window": {"windows": [4, 9], "test_window": 6},
        "data": {"sequence_length": 64, "train": [{"path": str(data)}]},
        "train": {"precision": "fp32", "steps": 10, "global_batch_size": 2},
        "validation": {"interval": 0},
        "optimizer": {"warmup": 1},
    }
    return {**raw, "model": model} if model else raw


def write_yaml(path: Path, raw: dict) -> str:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


def run_import(tmp_path: Path, model: Path, raw: dict, *options: str) -> Checkpoint:
    assert main(["--model", str(model), "--config", write_yaml(tmp_path / "train.yaml", raw), *options]) == 0
    return open_checkpoint(Path(raw["run_dir"]) / "checkpoints" / "step_0")


def refused(capsys, tmp_path: Path, model: Path, raw: dict, *options: str) -> str:
    """Standard error of a refused import; nothing was written."""
    assert main(["--model", str(model), "--config", write_yaml(tmp_path / "train.yaml", raw), *options]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert not Path(raw["run_dir"]).exists()
    return error


def with_initial_padding(raw: dict, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The padding rows of the vocabulary as a training leaves them: where they began."""
    config = from_dict(raw)
    for name, tensor in weights.items():
        if tensor.shape[0] == PADDED:
            initial, seed = initial_value(name, config.model), config.train.model_seed
            fill(tensor[VOCABULARY:], initial, name, seed, tuple(tensor.shape), (VOCABULARY, 0))
    return weights


@pytest.mark.parametrize("pattern, tied", [("MSF", False), ("MS", True)])
def test_export_and_back_is_bit_exact(pattern, tied, data, tokenizer, tmp_path):
    """Every master weight, padding rows included; the moments start at zero; and the second export is the first one."""
    raw = raw_config(pattern, model={**raw_config(pattern)["model"], "tie_embeddings": tied})
    weights = with_initial_padding(raw, random_weights(raw))
    old = open_checkpoint(checkpoint_of(tmp_path / "old" / "checkpoints", raw, weights))
    first = export_model(old, tmp_path / "first", tokenizer=tokenizer, max_shard_bytes=60_000)
    assert len(list(first.glob("*.safetensors"))) > 1
    new = run_import(tmp_path, first, training(data, tmp_path / "new"))
    new.verify()
    assert new.step == 0 and new.config["model"] == {**old.config["model"], "pattern": pattern}
    for name, tensor in weights.items():
        assert torch.equal(new.read_tensor(f"param.{name}"), tensor), name
        assert not new.read_tensor(f"exp_avg.{name}").any() and not new.read_tensor(f"exp_avg_sq.{name}").any()
        assert new.dtype(f"param.{name}") == torch.float32
    assert len(new.keys()) == 3 * len(weights)
    second = export_model(new, tmp_path / "second", tokenizer=tokenizer, max_shard_bytes=60_000)
    for file in sorted(first.glob("*.safetensors")):
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text()) == new.config


def test_a_bf16_export_comes_back_rounded_once(data, tokenizer, tmp_path):
    raw = raw_config("MS")
    weights = random_weights(raw)
    out = export_model(open_checkpoint(checkpoint_of(tmp_path / "old", raw, weights)), tmp_path / "out", dtype="bf16", tokenizer=tokenizer)
    new = run_import(tmp_path, out, training(data, tmp_path / "new"))
    for name, tensor in weights.items():
        want = tensor if "gate_proj" in name and "mlp" not in name and "ogate" not in name else tensor.bfloat16().float()
        got = new.read_tensor(f"param.{name}")
        assert torch.equal(got[:VOCABULARY], want[:VOCABULARY]) if tensor.shape[0] == PADDED else torch.equal(got, want), name


# ------------------------------------------------------------------------------------------------------------- xLSTM


def xlstm(**changes) -> xLSTMForCausalLM:
    fields = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_heads=2,
        ffn_round_up_to_multiple_of=32,
        gate_soft_cap=9.0,
        output_logit_soft_cap=20.0,
        norm_eps=1e-5,
        chunk_size=16,
    )
    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(**{**fields, **changes})).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_xlstm_comes_in_with_its_logits(mode, data, tokenizer, tmp_path, monkeypatch):
    if mode == "fused":  # transformers cannot initialise its own fused layout: two lines of different sizes
        monkeypatch.setattr(xLSTMPreTrainedModel, "_init_weights", lambda self, module: None)
    model = xlstm(weight_mode=mode)
    model.save_pretrained(tmp_path / "xlstm")
    raw = training(data, tmp_path / "run")
    checkpoint = run_import(tmp_path, tmp_path / "xlstm", raw, "--no-tokenizer-check")
    assert checkpoint.config["model"]["pattern"] == "Mx2" and checkpoint.config["model"]["mlstm_qk_dim"] == 32
    ours = SwaxForCausalLM.from_pretrained(export_model(checkpoint, tmp_path / "out")).eval()
    ids = tokens(2, 83)
    with torch.no_grad():
        want, got = model(ids).logits, ours(ids).logits
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_xlstm_goes_out_with_our_logits(tied, data, tokenizer, tmp_path, capsys):
    """transformers' own class computes the same logits, cached decoding included; and the folder comes back bit by bit."""
    model = {"hidden_size": 96, "mlstm_heads": 2, "mlstm_qk_dim": 32, "mlstm_v_dim": 64, "ffn_hidden_size": 77, "tie_embeddings": tied}
    raw = raw_config("MMM", model={**raw_config("MMM")["model"], **model, "norm_eps": 1e-3, "gate_cap": 11.0, "attention_head_dim": 24})
    weights = random_weights(raw)
    checkpoint = open_checkpoint(checkpoint_of(tmp_path / "old", raw, weights))
    command = ["--checkpoint", str(checkpoint.path), "--tokenizer", str(tokenizer)]
    assert export_main([*command, "--out", str(tmp_path / "xlstm"), "--as", "xlstm"]) == 0
    assert not list((tmp_path / "xlstm").glob("*.py")) and "own `xLSTMForCausalLM`" in (tmp_path / "xlstm" / "README.md").read_text()
    theirs = xLSTMForCausalLM.from_pretrained(tmp_path / "xlstm").eval()
    ours = SwaxForCausalLM.from_pretrained(export_model(checkpoint, tmp_path / "swax", tokenizer=tokenizer)).eval()
    ids = tokens(2, 100)
    with torch.no_grad():
        want = ours(ids).logits
        assert want.std() > 0.3
        torch.testing.assert_close(theirs(ids).logits, want, atol=1e-4 * max(1.0, want.std().item()), rtol=0)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(ids, **options), ours.generate(ids, **options))
    again = run_import(tmp_path, tmp_path / "xlstm", training(data, tmp_path / "run"))
    for name, tensor in weights.items():
        rows = min(VOCABULARY, tensor.shape[0])
        assert torch.equal(again.read_tensor(f"param.{name}")[:rows], tensor[:rows])
    if tied:  # xLSTM has no tied tables: the head is a copy
        assert torch.equal(again.read_tensor("param.output_layer.weight")[:VOCABULARY], weights[EMBEDDING][:VOCABULARY])


def test_what_xlstm_cannot_express_is_refused(tokenizer, tmp_path, capsys):
    model = {"logit_cap": None, "mlstm_qk_dim": 5}
    raw = raw_config("MS", model={**raw_config("MS")["model"], **model})
    checkpoint = checkpoint_of(tmp_path / "old", raw, random_weights(raw))
    command = ["--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), "--as", "xlstm"]
    assert export_main(command) == 2
    error = capsys.readouterr().err
    for part in ("attention layers", "logit_cap=null", "mlstm_qk_dim = 10 is no multiple of 64", "mlstm_v_dim = 32 is no multiple"):
        assert part in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field, value", [("use_bias", True), ("eps", 1e-3), ("add_qk_norm", True)])
def test_xlstm_with_other_mathematics_is_refused(field, value, data, tmp_path, capsys):
    model = xlstm()
    model.save_pretrained(tmp_path / "xlstm")
    path = tmp_path / "xlstm" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert f"{field}={value}" in refused(capsys, tmp_path, tmp_path / "xlstm", training(data, tmp_path / "run"), "--no-tokenizer-check")


# ------------------------------------------------------------------------------------------------------------- Llama


def llama(tmp_path: Path, **changes) -> LlamaForCausalLM:
    fields = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "llama")
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_llama_comes_in_with_its_logits(tied, data, tmp_path):
    model = llama(tmp_path, tie_word_embeddings=tied)
    checkpoint = run_import(tmp_path, tmp_path / "llama", training(data, tmp_path / "run"), "--no-tokenizer-check")
    assert checkpoint.state["imported"]["fresh"] == [] and checkpoint.config["model"]["pattern"] == "Fx3"
    ours = SwaxForCausalLM.from_pretrained(export_model(checkpoint, tmp_path / "out")).eval()
    ids = tokens(2, 70)
    with torch.no_grad():
        want = model(ids).logits
        assert want.std() > 0.3
        torch.testing.assert_close(ours(ids).logits, want, atol=1e-4, rtol=0)


HYBRID = {"pattern": "MSMF", "mlstm_heads": 2}


@pytest.mark.parametrize(
    "option, expected",
    [("order", {1: 0, 3: 1}), ("index", {0: 0, 1: 1, 2: 2}), ("3=0, 1=2,0=1", {3: 0, 1: 2, 0: 1})],
)
def test_llama_layer_by_layer(option, expected, data, tmp_path, capsys):
    """What has a counterpart is Llama's, all else is what a fresh training of the project begins with."""
    theirs = llama(tmp_path).state_dict()
    checkpoint = run_import(
        tmp_path, tmp_path / "llama", training(data, tmp_path / "run", **HYBRID), "--layers", option, "--no-tokenizer-check"
    )
    said = capsys.readouterr().out
    config = from_dict(checkpoint.config)
    kinds = "MSMF"
    for name, shape in parameter_shapes(config, padded=True).items():
        got = checkpoint.read_tensor(f"param.{name}")
        want = torch.empty(shape)
        fill(want, initial_value(name, config.model), name, config.train.model_seed, shape, (0,) * len(shape))
        source = None
        if name in (EMBEDDING, "output_layer.weight"):
            source = "model.embed_tokens.weight" if name == EMBEDDING else "lm_head.weight"
        elif name == "decoder.final_layernorm.weight":
            source = "model.norm.weight"
        else:
            index, rest = int(name.split(".")[2]), name.split(".", 3)[3]
            rest = rest.replace("self_attention.out_proj", "self_attn.o_proj").replace("self_attention", "self_attn")
            rest = rest.replace("pre_mlp_layernorm", "post_attention_layernorm")
            if index in expected and (kinds[index] != "M" or "mlp" in rest or "post" in rest):
                source = f"model.layers.{expected[index]}.{rest}"
        if source:
            want[: theirs[source].shape[0]] = theirs[source]
        assert torch.equal(got, want), name
        assert (source is None) == (name in checkpoint.state["imported"]["fresh"])
        assert (source is None) == (f"  {name}\n" in said)


def test_llama_without_its_tables(data, tmp_path):
    """Another vocabulary, another tokenizer: embedding and head start fresh, and the tokenizers are not compared."""
    llama(tmp_path, vocab_size=77)
    raw = training(data, tmp_path / "run", **HYBRID, vocab_size=VOCABULARY)
    checkpoint = run_import(tmp_path, tmp_path / "llama", raw, "--without", "embedding", "head")
    assert {EMBEDDING, "output_layer.weight"} <= set(checkpoint.state["imported"]["fresh"])
    assert checkpoint.shape(f"param.{EMBEDDING}") == (PADDED, 32)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    raw = raw_config("MS")
    return export_model(open_checkpoint(checkpoint_of(folder / "old", raw, random_weights(raw))), folder / "out", tokenizer=tokenizer)


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_every_wrong_tensor_is_named(copy, data, tmp_path, capsys):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mixer.igate_proj.bias"], tensors["model.norm.weight"]
    tensors["model.layers.1.mixer.q_proj.weight"] = torch.zeros(31, 32)
    tensors["lm_head.weight"] = torch.zeros(VOCABULARY + 1, 32)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    error = refused(capsys, tmp_path, copy, training(data, tmp_path / "run"))
    for part in (
        "model.layers.0.mixer.igate_proj.bias is missing",
        "model.norm.weight is missing",
        "model.layers.1.mixer.q_proj.weight is (31, 32), not (32, 32)",
        "lm_head.weight is (401, 32), not (400, 32)",
        "model.layers.2.mlp.up_proj.weight has no place in the model",
    ):
        assert part in error


def test_every_wrong_field_is_named(exported, data, tmp_path, capsys):
    error = refused(capsys, tmp_path, exported, training(data, tmp_path / "run", pattern="SM", hidden_size=64, norm_eps=1e-3))
    for part in ("model.pattern='SM', the weights have 'MS'", "model.hidden_size=64, the weights have 32", "model.norm_eps=0.001"):
        assert part in error
    run_import(tmp_path, exported, training(data, tmp_path / "run", pattern="(MS)x1", hidden_size=32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_types": ["mamba", "sliding_attention"]}, "got mamba"),
        ({"model_type": "gpt2"}, "type 'gpt2'; swax, xlstm, llama, mistral can be imported"),
        ({"mlstm_eps": 1e-4}, "mlstm_eps=0.0001 (must be 1e-06)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3"),
    ],
)
def test_unknown_models_are_refused(change, message, copy, data, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    assert message in refused(capsys, tmp_path, copy, training(data, tmp_path / "run"))


def test_unreadable_folders_are_refused(copy, data, tmp_path, capsys):
    raw = training(data, tmp_path / "run")
    assert "has no config.json" in refused(capsys, tmp_path, tmp_path, raw)
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    assert "damaged" in refused(capsys, tmp_path, copy, raw)
    (copy / "model.safetensors").unlink()
    assert "lacks 'model.safetensors'" in refused(capsys, tmp_path, copy, raw)
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks '../elsewhere.safetensors'" in refused(capsys, tmp_path, copy, raw)


def test_another_tokenizer_is_refused(copy, exported, data, tmp_path, capsys):
    raw = training(data, tmp_path / "run")
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = [piece for piece, index in vocabulary.items() if index in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    error = refused(capsys, tmp_path, copy, raw)
    assert "tokenizer is not that of the training data" in error and f"{a!r} is 301 in the model, 300 in the data" in error
    content = json.loads((exported / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert "splits text in another way" in refused(capsys, tmp_path, copy, raw)
    (copy / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in refused(capsys, tmp_path, copy, raw)
    run_import(tmp_path, copy, raw, "--no-tokenizer-check")


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"attention_bias": True}, [], "attention_bias=True (must be False)"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, [], "rope_type 'linear'"),
        ({}, ["--layers", "0=0,9=1"], "--layers 9=1"),
        ({}, ["--layers", "1:0"], "write order, index, or pairs"),
        ({"hidden_act": "gelu"}, [], "hidden_act='gelu'"),
    ],
)
def test_llamas_that_do_not_fit(changes, options, message, data, tmp_path, capsys):
    llama(tmp_path, **changes)
    raw = training(data, tmp_path / "run", **HYBRID)
    assert message in refused(capsys, tmp_path, tmp_path / "llama", raw, "--no-tokenizer-check", *options)


def test_llama_sizes_must_be_ours(data, tmp_path, capsys):
    llama(tmp_path)
    raw = training(data, tmp_path / "run", **HYBRID, ffn_hidden_size=64, rope_base=1e4, attention_heads=8)
    error = refused(capsys, tmp_path, tmp_path / "llama", raw, "--no-tokenizer-check")
    for part in ("model.ffn_hidden_size=64, the weights have 48", "model.rope_base=10000.0", "model.attention_heads=8, the weights have 4"):
        assert part in error


def test_a_run_with_checkpoints_is_left_alone(exported, data, tmp_path, capsys):
    raw = training(data, tmp_path / "run")
    before = run_import(tmp_path, exported, raw).path.stat().st_ino
    assert main(["--model", str(exported), "--config", str(tmp_path / "train.yaml")]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_0").stat().st_ino == before


def test_show_prints_the_model_section(exported, capsys):
    assert main(["--model", str(exported), "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    assert shown["pattern"] == "MS" and shown["mlstm_v_dim"] == 16
