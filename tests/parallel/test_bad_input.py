"""What a user can get wrong when starting a run: one sentence, exit code 2, nothing written."""

from __future__ import annotations

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
