"""Results, one file a unit of work: a long evaluation goes on where it was stopped, and plots are drawn from what is stored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


class Units:
    """A folder of results of one model under one setting.

    identity: what all units share (model, window, precision, ...); a folder that holds another identity is refused.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        stored = self.folder / "evaluation.json"
        wanted = {"format_version": FORMAT_VERSION, **identity}
        if stored.exists():
            found = read_json(stored)
            other = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            if other:
                told = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} asked for" for key in other)
                raise ValueError(f"--out {self.folder} holds another evaluation ({told}); name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(stored, wanted)

    def add(self, name: str, kind: str, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do and store a unit, unless it is stored already for the same ``asked``: the options that its result depends on."""
        path = self.folder / "units" / f"{name}.json"
        if path.exists() and read_json(path).get("asked") == asked:
            return
        content = {"kind": kind, "asked": asked, **work()}
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)


def stored_units(folder: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The identity and every unit by name. Raises ValueError where there is no evaluation."""
    folder = Path(folder)
    if not (folder / "evaluation.json").exists():
        raise ValueError(f"{folder} holds no evaluation.json: give the --out folder of python -m swax_megatron.eval")
    units = {path.stem: read_json(path) for path in sorted((folder / "units").glob("*.json"))}
    return read_json(folder / "evaluation.json"), units


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and evaluate again") from error


def write_json(path: Path, content: Any) -> None:
    """Write aside, then rename: a unit is there whole or not at all."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
