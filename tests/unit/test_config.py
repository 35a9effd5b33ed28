"""Reading a configuration: YAML, overrides, derived fields, and every mistake named."""

from __future__ import annotations

import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from swax_megatron.config import describe, field_paths, from_dict, load_config, to_dict, to_yaml
from swax_megatron.schema import FORMAT_VERSION, Config


@pytest.fixture
def write(tmp_path: Path) -> typing.Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_yaml_then_overrides(write: typing.Callable[[str], Path]) -> None:
    path = write("train: {steps: 7, global_batch_size: 2}\ndata: {train: [{path: a}, {path: b}]}\n")
    config = load_config(path, ["train.steps=9", "window.windows=[4, 8]", "data.train.1.path=c/d", "model.logit_cap=null"])
    assert (config.train.steps, config.train.global_batch_size) == (9, 2)
    assert config.window.windows == [4, 8]
    assert [source.path for source in config.data.train] == ["a", "c/d"]
    assert config.model.logit_cap is None


def test_numbers_in_scientific_notation_are_numbers() -> None:
    """YAML 1.1 reads 1e-4 as text."""
    assert load_config(None, ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


def test_derived_fields_are_filled_in() -> None:
    config = from_dict({"model": {"hidden_size": 64, "attention_heads": 4, "mlstm_heads": 2}, "window": {"windows": [8, 32, 16]}})
    assert (config.model.attention_kv_heads, config.model.attention_head_dim) == (4, 16)
    assert (config.model.mlstm_qk_dim, config.model.mlstm_v_dim) == (16, 32)
    assert (config.window.anneal_window, config.window.test_window) == (32, 32)
    assert config.window.probabilities == [1 / 3] * 3
    assert config.parallel.sequence is False  # one tensor-parallel rank
    assert from_dict({"data": {"train": [{"path": "data/code/"}]}}).data.train[0].name == "code"


def test_the_resolved_configuration_reads_back_unchanged() -> None:
    config = load_config(None, ["parallel.tensor=2", "data.train=[{path: a, weight: 2}]", "window.anneal_window=2048"])
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        (["train.stepz=5"], ["'train.stepz'", "did you mean 'train.steps'"]),
        (["training.steps=5"], ["'training'", "did you mean 'train'"]),
        (["model.steps=5"], ["'model.steps'", "did you mean 'train.steps'"]),
        (["data.train=[{path: a, wieght: 2}]"], ["'data.train.0.wieght'", "'data.train.0.weight'"]),
        (["train=5"], ["train=5", "section"]),
        (["train.steps=many"], ["train.steps='many'", "integer"]),
        (["train.steps=1.5"], ["train.steps=1.5", "integer"]),
        (["train.steps="], ["train.steps=None", "integer"]),
        (["optimizer.backend=adam"], ["optimizer.backend='adam'", "'zero' or 'megatron'"]),
        (["window.windows=16"], ["window.windows=16", "list"]),
        (["data.train=[a]"], ["data.train.0='a'"]),
        (["train.steps"], ["'train.steps'", "section.field=value"]),
        (["train.steps=5", "train.steps.more=5"], ["'train.steps' is a value, not a section"]),
        (["data.train.0.path=a"], ["data.train"]),
        (["data.train=[{path: a}]", "data.train.3.path=b"], ["'3' is no index of a list of 1"]),
        (["train.steps=[1"], ["the value is not YAML"]),
        (["model.hidden_size=100", "model.attention_heads=3"], ["model.attention_head_dim", "model.attention_heads=3"]),
        (["model.hidden_size=96", "model.mlstm_heads=32"], ["model.mlstm_qk_dim", "model.mlstm_heads=32 x 2"]),
        ([f"format_version={FORMAT_VERSION + 1}"], [f"format_version {FORMAT_VERSION + 1} is newer", "update swax_megatron"]),
    ],
)
def test_mistakes_are_named(overrides: list[str], pieces: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, overrides)
    for piece in pieces:
        assert piece in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("train: [1, 2", ["is not YAML", "line 1"]),
        ("train:\n  steps: 1\n bad: 2\n", ["is not YAML", "line 3"]),
        ("- a\n- b\n", ["must hold sections", "list"]),
        ("train: !!python/object/apply:os.getcwd []\n", ["is not YAML", "could not determine a constructor"]),
    ],
)
def test_unreadable_files(write: typing.Callable[[str], Path], text: str, pieces: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write(text))
    for piece in [*pieces, "config.yaml"]:
        assert piece in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.yaml cannot be read .No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00train")
    with pytest.raises(ValueError, match="binary.yaml is not YAML"):
        load_config(tmp_path / "binary.yaml")


def test_every_field_is_documented_and_described() -> None:
    described = describe()
    for path in field_paths():
        assert f"  {path}=" in described, path

    def undocumented(cls: type) -> typing.Iterator[str]:
        hints = typing.get_type_hints(cls)
        assert cls.__doc__, cls
        for item in fields(cls):
            if is_dataclass(hints[item.name]):
                yield from undocumented(hints[item.name])
            elif len(item.metadata["doc"]) < 10:
                yield f"{cls.__name__}.{item.name}"

    assert not list(undocumented(Config))


def test_the_configuration_page_is_up_to_date() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert describe() in page, "docs/configuration.md is stale: run `python scripts/write_docs.py`"


def test_one_virtual_chunk_is_the_plain_schedule() -> None:
    assert from_dict({"parallel": {"pipeline": 2, "virtual_pipeline": 1}}).parallel.virtual_pipeline is None


def test_an_override_below_a_value() -> None:
    with pytest.raises(ValueError, match="is a value, not a section"):
        load_config(None, ["window.windows=[1, 2]", "window.windows.0.x=3"])
