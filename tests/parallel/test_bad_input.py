"""What a user can get wrong when starting a run: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs


def truncate_tar(corpus: Path) -> None:
    victim = sorted((corpus / "a").glob("*.tar"))[0]
    victim.write_bytes(victim.read_bytes()[:-700])


def lose_manifest(corpus: Path) -> None:
    (corpus / "b" / "manifest.json").unlink()


def nothing(corpus: Path) -> None:
    pass


CASES: dict[str, tuple[dict[str, Any], Callable[[Path], None], list[str]]] = {
    "vocabulary of another tokenizer": ({"model": {"vocab_size": 300}}, nothing, ["vocab", "200", "300"]),
    "truncated tar": ({}, truncate_tar, [".tar", "bytes"]),
    "data set without manifest": ({}, lose_manifest, ["manifest.json"]),
    "tensor degree that divides no heads": ({"parallel": {"tensor": 3}}, nothing, ["parallel.tensor"]),
}


@pytest.mark.parametrize("program", ["launcher.run", "swax_megatron.train"])
@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name: str, program: str, corpus: Path, tmp_path: Path) -> None:
    sections, damage, words = CASES[name]
    shutil.copytree(corpus, tmp_path / "corpus")
    damage(tmp_path / "corpus")
    raw = runs.small_config(tmp_path / "corpus", tmp_path / "run", **sections)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    done = subprocess.run([sys.executable, "-m", program, str(tmp_path / "config.yaml")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def another_tokenizer(corpus: Path) -> None:
    """The validation set as another tokenizer of the same size would have left it: its fingerprint differs."""
    folder = corpus / "validation"
    model = folder / "tokenizer.model"
    model.write_bytes(b"another tokenizer")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_validation_of_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    another_tokenizer(tmp_path / "corpus")
    raw = runs.small_config(tmp_path / "corpus", tmp_path / "run", validation={"interval": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "swax_megatron.train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "tokenised with another tokenizer" in done.stderr, done.stderr


def test_never_resume_refuses_a_used_run_dir(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """The old checkpoints have higher step numbers: pruning would keep them and drop the new run's."""
    raw = runs.small_config(corpus, tmp_path / "run", checkpoint={"interval": 2})
    workers(1).run(runs.train, raw)
    raw["checkpoint"]["resume"] = "never"
    message = workers(1).run(refused, raw)[0]
    assert "checkpoint.resume=never" in message and "another run_dir" in message


def refused(raw: dict[str, Any]) -> str:
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, checkpoints = build_trainer(config, groups)
        try:
            checkpoints.resume(trainer)
        except ValueError as error:
            return str(error)
        return "no error"


def loss_explodes(raw: dict[str, Any]) -> str:
    from swax_megatron.build import build_trainer
    from swax_megatron.errors import RunError

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        try:
            trainer.fit()
        except RunError as error:
            return str(error)
        return "no error"


@pytest.mark.parametrize("backend", ["zero", "megatron"])
def test_a_loss_that_is_not_finite_stops_the_run(backend: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """The guard leaves the updates out, finds no good checkpoint to go back to and says what to do; on every rank."""
    raw = runs.small_config(
        corpus,
        tmp_path / "run",
        optimizer={"backend": backend, "learning_rate": 1e30, "eps": 1e-8, "warmup": 0},
        checkpoint={"interval": 1},
        train={"steps": 20},
    )
    for message in workers(2).run(loss_explodes, raw):
        assert "updates in a row were left out" in message and "optimizer.learning_rate" in message
