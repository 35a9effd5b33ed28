"""The one configuration object: nested dataclasses <- YAML <- dotted overrides.

``load_config`` builds it, ``swax_megatron.validate.validate`` refuses what cannot run, before any process group
exists. The resolved object is written into every run directory and checkpoint. The fields themselves, with their
meaning, are in ``swax_megatron.schema``.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from swax_megatron.schema import FORMAT_VERSION, Config, ModelConfig


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``section.field=value`` overrides, fill in derived fields.

    Raises ValueError that names an unknown key (with the nearest right one), a wrong type or an unreadable file.
    """
    return from_dict(read_raw(path, overrides))


def read_raw(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file and overrides say, and no defaults. ValueError for an unreadable file."""
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ValueError(f"config {path} cannot be read ({error.strerror}): give a YAML file, e.g. configs/demo.yaml") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config {path} is not YAML: {_yaml_problem(error)}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"config {path} must hold sections such as 'model:' and 'train:', not a {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return raw


def from_dict(raw: dict[str, Any]) -> Config:
    """A resolved Config from plain dictionaries; ValueError for unknown keys and wrong types."""
    version = raw.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"format_version {version} is newer than this program's {FORMAT_VERSION}: update swax_megatron")
    _refuse_unknown(Config, raw, "")
    try:
        config = TypeAdapter(Config).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}={first['input']!r}: {first['msg']}") from error
    return _resolve(config)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe(cls: type = Config, prefix: str = "") -> str:
    """Every field with its default (as YAML), its choices and its meaning, one a line, for ``--help``."""
    lines: list[str] = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            lines += ["", f"{prefix}{item.name}: {(kind.__doc__ or '').strip()}", describe(kind, f"{prefix}{item.name}.")]
            continue
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        choices = f" ({' | '.join(typing.get_args(kind))})" if typing.get_origin(kind) is Literal else ""
        lines.append(f"  {prefix}{item.name}={_as_yaml(default)}{choices}  {item.metadata['doc']}")
        if entry := _entry(kind):
            lines.append(describe(entry, f"{prefix}{item.name}.N."))
    return "\n".join(lines)


def _entry(kind: Any) -> type | None:
    """The dataclass of a list's entries; None for any other field."""
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    return inner if dataclasses.is_dataclass(inner) else None


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def field_paths(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted name of every field, e.g. ``train.steps``."""
    hints = typing.get_type_hints(cls)
    paths: list[str] = []
    for item in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(hints[item.name])
        paths += field_paths(hints[item.name], f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return paths


def _yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"


def _refuse_unknown(cls: type, raw: Any, prefix: str) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix.rstrip('.')}={raw!r}: expected a section with fields, e.g. {prefix}{dataclasses.fields(cls)[0].name}")
    names = [item.name for item in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        if key not in names:
            raise ValueError(f"unknown config field '{prefix}{key}'{_suggest(str(key), prefix, names)}")
        if dataclasses.is_dataclass(hints[key]):
            _refuse_unknown(hints[key], value, f"{prefix}{key}.")
        elif (entry := _entry(hints[key])) and isinstance(value, list):
            for index, each in enumerate(value):
                if isinstance(each, dict):
                    _refuse_unknown(entry, each, f"{prefix}{key}.{index}.")


def _suggest(key: str, prefix: str, names: list[str]) -> str:
    """The right name: the same field of another section first, then what is spelt alike here, then anywhere."""
    everywhere = field_paths()
    near = [path for path in everywhere if path.rsplit(".", 1)[-1] == key]
    near = near or [prefix + name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
    near = near or difflib.get_close_matches(prefix + key, everywhere, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known fields here: {', '.join(names)}"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ValueError(f"override {override!r} must read section.field=value, e.g. train.steps=50")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {_yaml_problem(error)}") from error
    node: Any = raw
    *parents, last = path.split(".")
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _list_item(node, part, override)
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: '{'.'.join(parents[: depth + 1])}' is a value, not a section")
    if isinstance(node, list):
        _list_item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _list_item(node: list[Any], part: str, override: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override {override!r}: '{part}' is no index of a list of {len(node)} entries")
    return node[int(part)]


def _resolve(config: Config) -> Config:
    """Fill in what is derived from other fields, so that the stored configuration says everything."""
    model, window = config.model, config.window
    if model.attention_kv_heads is None:
        model.attention_kv_heads = model.attention_heads
    if model.attention_head_dim is None:
        model.attention_head_dim = _head_dim(model, "attention_heads", "attention_head_dim", 1)
    if model.mlstm_qk_dim is None:
        model.mlstm_qk_dim = _head_dim(model, "mlstm_heads", "mlstm_qk_dim", 2)
    if model.mlstm_v_dim is None:
        model.mlstm_v_dim = _head_dim(model, "mlstm_heads", "mlstm_v_dim", 1)
    if window.windows:
        if window.anneal_window is None:
            window.anneal_window = max(window.windows)
        if window.test_window is None:
            window.test_window = window.anneal_window
        if window.probabilities is None:
            window.probabilities = [1.0 / len(window.windows)] * len(window.windows)
    if config.parallel.virtual_pipeline == 1:
        config.parallel.virtual_pipeline = None  # one chunk a stage is the plain schedule
    if config.parallel.tensor == 1:
        config.parallel.sequence = False
    for source in [*config.data.train, *config.data.validation]:
        source.name = source.name or Path(source.path.removesuffix("{file}")).name
    return config


def _head_dim(model: ModelConfig, heads: str, dim: str, parts: int) -> int | None:
    """hidden_size / heads / parts; None where the counts themselves are wrong, which validate() refuses."""
    count = getattr(model, heads)
    if count < 1 or model.hidden_size < 1:
        return None
    if model.hidden_size % (count * parts):
        divisor = f"model.{heads}={count}" + (f" x {parts}" if parts > 1 else "")
        raise ValueError(
            f"model.{dim} is not given, and model.hidden_size={model.hidden_size} is not divisible by {divisor}: set model.{dim}"
        )
    return model.hidden_size // (count * parts)
