"""The points of a sweep: one YAML file, a grid over any fields of the configuration, one run a point.

    base: configs/demo.yaml
    overrides: [train.steps=200]          # for every point
    concurrent: 4                         # points that run at once (missing: one on this machine, all on a cluster)
    grid:
      optimizer.learning_rate: [1.0e-3, 3.0e-3]
      parallel.tensor: [1, 2]

Every point runs in a directory of its own under the base's run_dir, named after its values.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swax_megatron.config import load_config

_KEYS = {"base", "overrides", "grid", "concurrent"}
_NAME_LENGTH = 120


@dataclass(frozen=True)
class Sweep:
    """points: the overrides of each run, its run_dir among them; concurrent: how many run at once, None for all."""

    base: str
    run_dir: str
    points: list[list[str]]
    concurrent: int | None


def read_sweep(path: str | Path, extra: list[str]) -> Sweep:
    """The points of a sweep file. extra: overrides for every point, stronger than the file's. Raises ValueError."""
    try:
        raw: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"sweep {path} cannot be read ({error}); see python -m launcher.sweep --help for its form") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("base"), str) or set(raw) - _KEYS:
        raise ValueError(f"sweep {path}: give base: CONFIG and grid: {{field: [values]}}, and of others only overrides and concurrent")
    grid, common, concurrent = raw.get("grid"), raw.get("overrides", []), raw.get("concurrent")
    if not isinstance(grid, dict) or not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"sweep {path}: grid: must name at least one field with a list of values")
    if not isinstance(common, list) or not all(isinstance(item, str) and "=" in item for item in common):
        raise ValueError(f"sweep {path}: overrides: must be a list of section.field=value")
    if "run_dir" in grid:
        raise ValueError(f"sweep {path}: grid.run_dir: every point gets a folder of its own; put run_dir=FOLDER into overrides")
    if concurrent is not None and (not isinstance(concurrent, int) or isinstance(concurrent, bool) or concurrent < 1):
        raise ValueError(f"sweep {path}: concurrent={concurrent!r}: must be a whole number of at least 1")
    common = [*common, *extra]
    folder = load_config(raw["base"], common).run_dir
    points = []
    for number, values in enumerate(itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        label = "_".join(f"{field.rsplit('.', 1)[-1]}={_plain(value)}" for field, value in chosen.items())
        name = f"{number:03d}_{label}"[:_NAME_LENGTH]
        points.append([*common, *(f"{field}={json.dumps(value)}" for field, value in chosen.items()), f"run_dir={folder}/{name}"])
    return Sweep(raw["base"], folder, points, concurrent)


def _plain(value: Any) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value if isinstance(value, str) else json.dumps(value)).strip("-")


def write_points(sweep: Sweep, stamp: str) -> Path:
    """Freeze the points for the array job that will read them: ``run_dir/sweep_<stamp>.json``."""
    folder = Path(sweep.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"sweep_{stamp}.json"
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    aside.write_text(json.dumps(sweep.points, indent=1), encoding="utf-8")
    aside.replace(target)
    return target


def point(reference: str) -> list[str]:
    """The overrides of one point. reference: FILE:INDEX, the file of ``write_points``."""
    path, _, index = reference.rpartition(":")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))[int(index)]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"--sweep {reference}: cannot be read ({error}); submit the sweep again with launcher.submit") from error
