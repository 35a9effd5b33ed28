"""The code and the configuration of a job, frozen in the run directory: what a requeued job runs is what was submitted.

``run_dir/snapshots/<job>/`` holds the packages, the scripts, ``config.yaml`` (resolved, paths absolute) and ``version.json``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from swax_megatron import __version__
from swax_megatron.config import to_yaml
from swax_megatron.schema import Config

PARTS = ("swax_megatron", "launcher", "data_prep", "slurm", "configs")


def absolute(config: Config) -> Config:
    """The same configuration with every path absolute, so that it can be read from any folder."""

    def whole(path: str | None) -> str | None:
        return os.path.abspath(path) if path else path

    data = dataclasses.replace(
        config.data,
        train=[dataclasses.replace(source, path=whole(source.path)) for source in config.data.train],
        validation=[dataclasses.replace(source, path=whole(source.path)) for source in config.data.validation],
        tokenizer=whole(config.data.tokenizer),
    )
    return dataclasses.replace(config, run_dir=whole(config.run_dir), data=data)


def take(config: Config, home: Path, job: str) -> Path:
    """Copy what the job runs to ``run_dir/snapshots/<job>`` unless an earlier start of the job has; return that folder.

    home: the project's folder. Written aside and renamed: a folder of that name is whole.
    """
    config = absolute(config)
    target = Path(config.run_dir) / "snapshots" / job
    if target.exists():
        return target
    aside = target.with_name(f".{job}.tmp-{os.getpid()}")
    aside.mkdir(parents=True)
    for part in PARTS:
        shutil.copytree(home / part, aside / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (aside / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (aside / "version.json").write_text(json.dumps(_version(home), indent=1), encoding="utf-8")
    aside.rename(target)
    return target


def _version(home: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain")
    return {"version": __version__, "commit": git("rev-parse", "HEAD"), "uncommitted": changed or None, "python": sys.version}
