"""What an import takes: for every training parameter the tensor of the source that becomes it, or nothing (a fresh start)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from swax_megatron.hf.folder import ModelFolder
from swax_megatron.schema import ModelConfig


@dataclass(frozen=True)
class Taken:
    """Rows ``start`` to ``stop`` of a source tensor (None: all of it)."""

    name: str
    start: int | None = None
    stop: int | None = None

    def shape(self, folder: ModelFolder) -> tuple[int, ...] | None:
        """The shape it gives; None where the source has no such tensor."""
        whole = folder.shapes.get(self.name)
        if whole is None or self.start is None:
            return whole
        return (max(0, min(self.stop, whole[0]) - self.start), *whole[1:])


@dataclass(frozen=True)
class Source:
    """A model folder as an import sees it.

    fixed: fields of the configuration's model section that the weights decide
    suggested: fields that they do not, but for which another value changes what the model computes
    plan: (pattern, model) -> {training name: Taken}, without the parameters that start fresh
    ignored: tensors of the source that are left behind on purpose
    """

    kind: str
    fixed: dict[str, Any]
    suggested: dict[str, Any]
    plan: Callable[[str, ModelConfig], dict[str, Taken]]
    ignored: Callable[[dict[str, Taken]], set[str]] = field(default=lambda plan: set())


def read(folder: ModelFolder, taken: Taken):
    """The tensor, as stored."""
    tensor = folder.read(taken.name)
    return tensor if taken.start is None else tensor[taken.start : taken.stop]


def need(config: dict[str, Any], fields: dict[str, Any], what: str) -> None:
    """ValueError that lists every field of ``config`` with another value than the one that can be imported."""
    wrong = [f"{name}={config[name]!r} (must be {value!r})" for name, value in fields.items() if name in config and config[name] != value]
    if wrong:
        raise ValueError(f"{what} cannot be imported: {'; '.join(wrong)}")


def field_of(config: dict[str, Any], name: str, what: str) -> Any:
    """A field of a config.json; ValueError where it is missing."""
    if config.get(name) is None:
        raise ValueError(f"{what}: config.json has no {name}")
    return config[name]
