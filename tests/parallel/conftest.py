"""A common starting point of the parity tests: a checkpoint whose weights are all far from their initial values."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swax_megatron.checkpoint.store import Fragment, open_checkpoint, save
from tests import runs
from tests.workers import Workers

START, END = 2, 4
# The norms' eps. A small one amplifies rounding: with 1e-2 the first bf16 gradient of one process is 14 to 100 percent away from
# fp32's, by the batch, and no bound on bf16 could see anything; with 0.1 it is 3 to 5 percent.
WELL_CONDITIONED = {"norm_eps": 0.1}
DIFFERENCES = pytest.StashKey[dict[str, list[dict[str, float]]]]()


@pytest.fixture(scope="session")
def differences(request: pytest.FixtureRequest) -> dict[str, list[dict[str, float]]]:
    """Precision -> the largest differences of every combination that was compared; told at the end of the session."""
    return request.config.stash.setdefault(DIFFERENCES, {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the largest differences and, with SWAX_MATRIX_RECORD=FILE, appends them to it as one JSON line."""
    found = config.stash.get(DIFFERENCES, {})
    if not found:
        return
    largest = {name: {key: max(each[key] for each in compared) for key in compared[0]} for name, compared in sorted(found.items())}
    counts = {name: len(compared) for name, compared in sorted(found.items())}
    for name, values in largest.items():
        told = ", ".join(f"{key} {value:.1e}" for key, value in values.items())
        terminalreporter.write_line(f"largest differences of {counts[name]} {name} combinations: {told}")
    if path := os.environ.get("SWAX_MATRIX_RECORD"):
        failed = len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", []))
        line = {"case": "parity of layouts", "equal": counts, "failed tests": failed, "largest differences": largest}
        line |= {"device": f"CPU, {platform.machine()}, gloo", "torch": torch.__version__, "date": time.strftime("%F")}
        line["command"] = " ".join(["pytest", *config.invocation_params.args])
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _stir(name: str, tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Weights under which every part of the model matters: open gates, unequal norms, gate weights that are not zero."""
    noise = torch.randn(tensor.shape, generator=random)
    if not name.startswith("param."):
        return tensor
    if name.endswith("igate_proj.bias"):
        return noise - 1.0
    if name.endswith("fgate_proj.bias"):
        return 2.0 + noise
    if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
        return tensor + 0.2 * noise
    return tensor + 0.05 * noise


@pytest.fixture(scope="session")
def started(workers: Callable[[int], Workers], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """started(name, **sections): the configuration of a run that will continue from the stirred checkpoint.

    interval: steps between its own checkpoints
    """
    folder = tmp_path_factory.mktemp("parity")
    origins: dict[str, Path] = {}

    def origin(rows: int, **identity: dict[str, Any]) -> Path:
        key = repr((rows, sorted((name, sorted(fields.items())) for name, fields in identity.items())))
        if key not in origins:
            run_dir = folder / f"origin-{len(origins)}"
            train, checkpoint = {"steps": END, "global_batch_size": rows}, {"interval": START, "keep_last": 0}
            raw = runs.small_config(corpus, run_dir, train=train, checkpoint=checkpoint, **identity)
            workers(1).run(runs.train, raw)
            first = open_checkpoint(run_dir / "checkpoints" / f"step_{START}")
            random = torch.Generator().manual_seed(7)
            fragments = []
            for name in sorted(first.keys()):
                tensor = _stir(name, first.read_tensor(name), random)
                fragments.append(Fragment(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor))
            origins[key] = folder / f"stirred-{len(origins)}"
            save(origins[key], START, fragments, config=first.config, state=first.state)
        return origins[key]

    def prepare(name: str, interval: int = END, **sections: dict[str, Any]) -> dict[str, Any]:
        run_dir = folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        sections["model"] = {**WELL_CONDITIONED, **sections.get("model", {})}
        rows = sections.get("train", {}).get("global_batch_size", 4)
        shutil.copytree(origin(rows, **{part: sections.get(part, {}) for part in ("model", "window", "data")}), run_dir / "checkpoints")
        sections["train"] = {"steps": END, **sections.get("train", {})}
        allowed = ["optimizer.learning_rate", "optimizer.beta2", "train.precision"]
        checkpoint = {"interval": interval, "keep_last": 0, "allow_change": allowed}
        return runs.small_config(corpus, run_dir, checkpoint=checkpoint, validation={"interval": END}, **sections)

    return prepare
