"""Every refusal of validate() names the field, its value and the fix; nothing valid is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from swax_megatron.config import field_paths, from_dict, load_config
from swax_megatron.schema import Config
from swax_megatron.validate import model_parallel_size, validate, validate_inputs, validate_run_dir
from swax_megatron.validate.ranges import AT_LEAST_ONE, BELOW_ONE, BIAS, FRACTION, NOT_NEGATIVE, POSITIVE, SEEDS

ROOT = Path(__file__).parents[2]


def raw(**changes: Any) -> dict[str, Any]:
    """A valid configuration as plain dictionaries; changes are dotted names with __ for the dot."""
    base: dict[str, Any] = {
        "model": {
            "pattern": "(MS)x4",
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "vocab_size": 512,
            "attention_heads": 8,
            "attention_kv_heads": 4,
            "mlstm_heads": 4,
        },
        "window": {"windows": [16, 64]},
        "data": {"train": [{"path": "data/train"}], "validation": [{"path": "data/validation"}], "sequence_length": 256},
        "optimizer": {"warmup": 10},
        "train": {"steps": 100, "global_batch_size": 8},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            base.setdefault(section, {})[field] = value
        else:
            base[section] = value
    return base


def config(**changes: Any) -> Config:
    return from_dict(raw(**changes))


def refusal(world_size: int | None = None, cuda: bool | None = False, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        validate(config(**changes), world_size, cuda)
    return str(caught.value)


def test_valid_configurations_pass() -> None:
    validate(config())
    validate(config(), 3 - 2)
    validate(config(), 8)
    validate(config(parallel={"tensor": 4, "pipeline": 2}), 8)
    validate(config(parallel={"pipeline": 2, "virtual_pipeline": 2}), 2)
    validate(config(parallel={"context": 4, "tensor": 2, "pipeline": 2}), 32)
    validate(config(parallel={"context": 128, "tensor": 4, "sequence": False}))
    validate(config(parallel={"pipeline": 3, "pipeline_layers": [3, 3, 2]}), 3)
    validate(config(parallel={"pipeline": 3}), 3)
    validate(config(parallel={"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 3, 2, 2]}), 2)
    validate(config(optimizer__offload=True, optimizer__zero_stage=3, parallel={"tensor": 2, "sequence": False}), cuda=True)
    validate(config(window__per_layer=True, window__schedule="stochastic"))
    validate(config(window={"windows": [256], "schedule": "fixed", "anneal_fraction": 0.0}))
    validate(config(validation={"interval": 0}, data={"train": [{"path": "x"}], "sequence_length": 256}))
    validate(config(model__rope_kinds="", model__attention_head_dim=7))
    validate(config(train__steps=0))
    validate(config(kernels={"backend": "triton"}), cuda=True)
    validate(config(optimizer={"backend": "megatron", "zero_stage": 2, "warmup": 0}))
    validate(config(checkpoint={"allow_change": ["train.steps", "data.train", "optimizer.schedule"]}))


@pytest.mark.parametrize("name", ["demo", "swax_1p4b", "swax_7b"])
def test_shipped_configurations_are_valid(name: str) -> None:
    shipped = load_config(ROOT / "configs" / f"{name}.yaml")
    validate(shipped, model_parallel_size(shipped))


# changes, world size -> what the message must contain: field=value, and a piece of the fix
REFUSALS: list[tuple[dict[str, Any], int | None, list[str]]] = [
    ({"run_dir": ""}, None, ["run_dir=''", "run_dir=runs/"]),
    ({"model__pattern": "MXS"}, None, ["model.pattern='MXS'", "letters"]),
    ({"model__pattern": "(MS"}, None, ["model.pattern='(MS'", "never closed"]),
    ({"model__rope_kinds": "SM"}, None, ["model.rope_kinds='SM'", "'M'", "letters of 'SF'"]),
    ({"model__attention_head_dim": 7}, None, ["model.attention_head_dim=7", "even size"]),
    ({"model__attention_kv_heads": 3}, None, ["model.attention_kv_heads=3", "divide model.attention_heads=8"]),
    ({"model__attention_kv_heads": 16}, None, ["model.attention_kv_heads=16", "divide"]),
    ({"window__windows": []}, None, ["window.windows=[]", "at least one"]),
    ({"window__windows": [0, 64]}, None, ["window.windows.0=0", "between 1 and data.sequence_length=256"]),
    ({"window__windows": [16, 257]}, None, ["window.windows.1=257", "data.sequence_length=256"]),
    ({"window__anneal_window": 512}, None, ["window.anneal_window=512", "data.sequence_length=256"]),
    ({"window__anneal_window": 0}, None, ["window.anneal_window=0", "between 1"]),
    ({"window__test_window": 300}, None, ["window.test_window=300", "data.sequence_length=256"]),
    ({"window__test_window": 0}, None, ["window.test_window=0", "between 1"]),
    ({"window__windows": [16, 16]}, None, ["window.windows=[16, 16]", "list it once"]),
    ({"window__probabilities": [1.0]}, None, ["window.probabilities=[1.0]", "one probability for each"]),
    ({"window__probabilities": [0.5, 0.4]}, None, ["window.probabilities=[0.5, 0.4]", "sum to 1"]),
    ({"window__probabilities": [1.5, -0.5]}, None, ["window.probabilities=[1.5, -0.5]", "between 0 and 1"]),
    ({"window__probabilities": [float("nan"), 0.5]}, None, ["window.probabilities", "sum to 1"]),
    ({"window": {"windows": [16], "schedule": "fixed", "per_layer": True}}, None, ["window.per_layer=True", "stochastic"]),
    ({"data": {"sequence_length": 256}}, None, ["data.train=[]", "name at least one"]),
    ({"data__validation": []}, None, ["data.validation=[]", "validation.interval=0"]),
    ({"data__train": [{"path": ""}]}, None, ["data.train.0.path=''", "data_prep/shard.py"]),
    ({"data__train": [{"path": "a", "weight": -1.0}]}, None, ["data.train.0.weight=-1.0", "0 or more"]),
    ({"data__train": [{"path": "a", "weight": float("inf")}]}, None, ["data.train.0.weight=inf", "finite"]),
    ({"data__train": [{"path": "a", "weight": 0.0}]}, None, ["data.train", "every weight is 0", "positive"]),
    ({"data__train": [{"path": "a/x"}, {"path": "b/x"}]}, None, ["data.train", "'x'", "data.train.N.name"]),
    ({"data__validation": [{"path": "a/x"}, {"path": "b/x"}]}, None, ["data.validation", "'x'", "name"]),
    ({"parallel": {"tensor": 3}}, None, ["model.attention_heads=8", "parallel.tensor=3", "model.attention_heads=9"]),
    ({"parallel": {"tensor": 8}}, None, ["model.attention_kv_heads=4", "parallel.tensor=8", "parallel.tensor=4"]),
    (
        {"parallel": {"tensor": 4}, "model__attention_heads": 12, "model__attention_kv_heads": 6, "model__attention_head_dim": 8},
        None,
        ["model.attention_kv_heads=6", "parallel.tensor=4", "model.attention_kv_heads=8"],
    ),
    ({"parallel": {"tensor": 4}, "model__mlstm_heads": 2}, None, ["model.mlstm_heads=2", "model.mlstm_heads=4"]),
    ({"parallel": {"tensor": 4}, "model__ffn_hidden_size": 130}, None, ["model.ffn_hidden_size=130", "model.ffn_hidden_size=132"]),
    (
        {
            "parallel": {"tensor": 3},
            "model": {
                "pattern": "S",
                "hidden_size": 48,
                "ffn_hidden_size": 96,
                "vocab_size": 500,
                "attention_heads": 6,
                "mlstm_heads": 1,
            },
        },
        None,
        ["parallel.tensor=3", "512", "model.vocab_size=500", "power of two"],
    ),
    ({"parallel": {"tensor": 4}, "data__sequence_length": 258}, None, ["data.sequence_length=258", "parallel.sequence=false"]),
    ({"parallel": {"pipeline": 9}}, None, ["parallel.pipeline=9", "8 layers", "fewer stages"]),
    ({"parallel": {"pipeline": 3, "virtual_pipeline": 3}}, None, ["parallel.pipeline=3", "3 chunks"]),
    ({"parallel": {"virtual_pipeline": 2}}, None, ["parallel.virtual_pipeline=2", "parallel.pipeline=1"]),
    (
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [4, 4]}},
        None,
        ["parallel.pipeline_layers=[4, 4]", "needs 4 numbers", "parallel.virtual_pipeline=2"],
    ),
    ({"parallel": {"pipeline": 2, "pipeline_layers": [8]}}, None, ["parallel.pipeline_layers=[8]", "parallel.pipeline=2"]),
    ({"parallel": {"pipeline": 2, "pipeline_layers": [8, 0]}}, None, ["parallel.pipeline_layers=[8, 0]", "at least one layer"]),
    ({"parallel": {"pipeline": 2, "pipeline_layers": [4, 3]}}, None, ["parallel.pipeline_layers=[4, 3]", "sums to 7", "8 layers"]),
    ({"parallel": {"context": 3}}, None, ["data.sequence_length=256", "parallel.context=3", "data.sequence_length=258"]),
    (
        {"parallel": {"context": 128, "tensor": 4}},
        None,
        ["data.sequence_length=256", "parallel.context=128 x parallel.tensor=4", "data.sequence_length=512", "parallel.sequence=false"],
    ),
    ({"parallel": {"context": 4}}, 6, ["6 processes", "parallel.context=4", "start 4"]),
    ({"train__micro_batch_size": 3}, None, ["train.global_batch_size=8", "train.micro_batch_size=3"]),
    ({"parallel": {"tensor": 2, "pipeline": 2}}, 6, ["6 processes", "parallel.tensor=2", "parallel.pipeline=2", "start 4"]),
    ({"parallel": {"tensor": 2}}, 1, ["1 processes", "parallel.tensor=2", "start 2"]),
    ({}, 3, ["train.global_batch_size=8", "3 data-parallel", "train.global_batch_size=9"]),
    (
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train__global_batch_size": 3},
        2,
        ["parallel.virtual_pipeline=2", "there are 3", "train.global_batch_size=4"],
    ),
    ({"optimizer__zero_stage": 4}, None, ["optimizer.zero_stage=4", "stages 0 to 3", "optimizer.zero_stage=1"]),
    ({"optimizer__zero_stage": -1}, None, ["optimizer.zero_stage=-1", "stages 0 to 3"]),
    (
        {"optimizer__zero_stage": 2, "parallel": {"pipeline": 2}},
        None,
        ["optimizer.zero_stage=2", "parallel.pipeline=2", "nothing over stage 1", "optimizer.zero_stage=1"],
    ),
    (
        {"optimizer__zero_stage": 3, "parallel": {"pipeline": 2}},
        None,
        ["optimizer.zero_stage=3", "parallel.pipeline=2", "gather", "optimizer.zero_stage=1"],
    ),
    ({"optimizer__overlap_parameters": True}, None, ["optimizer.overlap_parameters=True", "optimizer.backend=megatron"]),
    (
        {"optimizer__zero_stage": 0, "optimizer__overlap_gradients": True},
        None,
        ["optimizer.overlap_gradients=True", "stage 0", "optimizer.zero_stage=1"],
    ),
    (
        {"optimizer__overlap_gradients": True, "parallel": {"pipeline": 2}},
        None,
        ["optimizer.overlap_gradients=True", "parallel.pipeline=2", "optimizer.backend=megatron"],
    ),
    (
        {"optimizer": {"backend": "megatron", "overlap_parameters": True, "warmup": 0}},
        None,
        ["optimizer.overlap_parameters=True", "optimizer.overlap_gradients=true"],
    ),
    ({"optimizer": {"backend": "megatron", "offload": True, "warmup": 0}}, None, ["optimizer.offload=True", "optimizer.backend=zero"]),
    ({"optimizer__offload": True, "optimizer__zero_stage": 0}, None, ["optimizer.offload=True", "stage 0", "optimizer.zero_stage=1"]),
    ({"optimizer__offload": True, "optimizer__overlap_gradients": True}, None, ["optimizer.offload=True", "overlap_gradients=false"]),
    (
        {"optimizer__offload": True, "optimizer__zero_stage": 2, "parallel": {"tensor": 2}},
        None,
        ["optimizer.offload=True", "stage 2", "parallel.sequence=false"],
    ),
    ({"optimizer__offload": True}, None, ["optimizer.offload=True", "no GPU", "optimizer.offload=false"]),
    ({"optimizer__min_learning_rate": 1.0}, None, ["optimizer.min_learning_rate=1.0", "optimizer.learning_rate=0.0006"]),
    ({"optimizer__warmup": 101}, None, ["optimizer.warmup=101", "100 steps", "optimizer.warmup=10"]),
    (
        {"optimizer": {"warmup": 300_000, "schedule_unit": "tokens"}},
        None,
        ["optimizer.warmup=300000", "204800 tokens", "train.steps"],
    ),
    ({"checkpoint": {"allow_change": ["train.step"]}}, None, ["checkpoint.allow_change", "'train.step'", "full name"]),
    ({"checkpoint": {"allow_change": ["model.hidden_size"]}}, None, ["checkpoint.allow_change", "model.hidden_size", "new run_dir"]),
    ({"kernels": {"backend": "triton"}}, None, ["kernels.backend='triton'", "kernels.backend=auto"]),
]


@pytest.mark.parametrize(("changes", "world_size", "pieces"), REFUSALS, ids=["-".join(row[0]) or "world" for row in REFUSALS])
def test_refusal(changes: dict[str, Any], world_size: int | None, pieces: list[str]) -> None:
    message = refusal(world_size, **changes)
    for piece in pieces:
        assert piece in message
    assert "\n" not in message


def _set(target: Config, path: str, value: Any) -> Config:
    *sections, name = path.split(".")
    node: Any = target
    for section in sections:
        node = getattr(node, section)
    setattr(node, name, value)
    return target


RANGES = [
    *((path, value, "at least 1") for path in AT_LEAST_ONE for value in (0, -2)),
    *((path, -1, "0 or more") for path in NOT_NEGATIVE),
    *((path, value, "less than 2^63") for path in SEEDS for value in (-1, 2**63)),
    ("train.distributed_timeout", 1e7, "30 days"),
    *((path, value, "more than 0") for path in POSITIVE for value in (0.0, -1.0, float("inf"), float("nan"))),
    *((path, value, "between 0 and 1") for path in FRACTION for value in (-0.1, 1.1, float("nan"))),
    *((path, value, "less than 1") for path in BELOW_ONE for value in (-0.1, 1.0, float("nan"))),
    *((path, value, "between -30 and 30") for path in BIAS for value in (-31.0, 31.0, float("nan"))),
]


@pytest.mark.parametrize(("path", "value", "requirement"), RANGES)
def test_range(path: str, value: Any, requirement: str) -> None:
    with pytest.raises(ValueError) as caught:
        validate(_set(config(), path, value))
    assert f"{path}={value!r}: must be" in str(caught.value) or f"{path}={value!r}: must lie" in str(caught.value)
    assert requirement in str(caught.value)


def test_every_number_has_a_range() -> None:
    """A new numeric field cannot be forgotten."""
    ranged = {*AT_LEAST_ONE, *NOT_NEGATIVE, *POSITIVE, *FRACTION, *BELOW_ONE, *SEEDS, *BIAS}
    elsewhere = {"window.anneal_window", "window.test_window", "optimizer.zero_stage", "format_version"}

    def numbers(cls: type, prefix: str) -> typing.Iterator[str]:
        hints = typing.get_type_hints(cls)
        for item in fields(cls):
            kind = hints[item.name]
            if is_dataclass(kind):
                yield from numbers(kind, f"{prefix}{item.name}.")
            elif {int, float} & {kind, *typing.get_args(kind)}:
                if typing.get_origin(kind) is not list:
                    yield prefix + item.name

    assert set(numbers(Config, "")) == ranged | elsewhere
    assert ranged <= set(field_paths())


def test_without_a_world_size_only_the_layout_is_checked() -> None:
    validate(config(parallel={"tensor": 2, "pipeline": 2}))


def _data_set(folder: Path, vocab_size: int) -> str:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": vocab_size}}))
    return str(folder)


def test_inputs(tmp_path: Path) -> None:
    good, other = _data_set(tmp_path / "good", 512), _data_set(tmp_path / "other", 640)
    data = {"train": [{"path": good}], "validation": [{"path": good}], "sequence_length": 256}
    validate_inputs(config(data=data))
    with pytest.raises(ValueError, match=r"data\.validation\.0\.path='nowhere': no manifest\.json there; write .*shard\.py"):
        validate_inputs(config(data={**data, "validation": [{"path": "nowhere"}]}))
    with pytest.raises(ValueError, match=r"model\.vocab_size=512: .* vocabulary of 640; use model\.vocab_size=640"):
        validate_inputs(config(data={**data, "train": [{"path": other}]}))
    with pytest.raises(ValueError, match=r"data\.tokenizer='absent\.model' cannot be read"):
        validate_inputs(config(data={**data, "tokenizer": "absent.model"}))
    (tmp_path / "good" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"data\.train\.0\.path=.*cannot be read"):
        validate_inputs(config(data=data))


def test_validation_needs_neither_torch_nor_megatron() -> None:
    code = "import sys, swax_megatron.validate; sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_run_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="run_dir=.*name another folder"):
        validate_run_dir(from_dict({"run_dir": str(tmp_path / "file")}))
    validate_run_dir(from_dict({"run_dir": str(tmp_path / "new" / "run")}))
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_inputs_of_different_tokenizers(tmp_path: Path) -> None:
    """Equal vocabulary sizes do not make equal ids; data.tokenizer must be the one that wrote the data as well."""
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        (tmp_path / name).mkdir()
        manifest = {"tokenizer": {"vocab_size": 32768, "sha256": digest}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    same = {"train": [{"path": str(tmp_path / "a")}], "validation": [{"path": str(tmp_path / "a")}]}
    validate_inputs(from_dict({"data": same}))
    for data in ({**same, "validation": [{"path": str(tmp_path / "b")}]}, {"train": [*same["train"], {"path": str(tmp_path / "b")}]}):
        with pytest.raises(ValueError, match="another tokenizer"):
            validate_inputs(from_dict({"data": data}))
    (tmp_path / "tokenizer.model").write_bytes(b"some model")
    with pytest.raises(ValueError, match="another tokenizer than data.tokenizer="):
        validate_inputs(from_dict({"data": {**same, "tokenizer": str(tmp_path / "tokenizer.model")}}))
