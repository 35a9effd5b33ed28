"""Refusals of the data sources: their values, then the folders they name."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

from swax_megatron.data.storage import is_remote, read_file
from swax_megatron.schema import Config, SourceConfig


def check_data(config: Config) -> None:
    data = config.data
    if not data.train:
        raise ValueError("data.train=[]: name at least one data set, e.g. data.train=[{path: data/train}]")
    if config.validation.interval > 0 and not data.validation:
        raise ValueError(
            f"data.validation=[]: validation.interval={config.validation.interval} needs a data set; name one or set validation.interval=0"
        )
    check_curriculum(config)
    check_remote(config)
    for role in ("train", "validation"):
        sources = getattr(data, role)
        for index, source in enumerate(sources):
            where = f"data.{role}.{index}"
            if not source.path:
                raise ValueError(f"{where}.path='': name a folder written by data_prep/shard.py")
            if not 0 <= source.weight < math.inf:
                raise ValueError(f"{where}.weight={source.weight!r}: must be 0 or more and finite")
        if sources and not math.fsum(source.weight for source in sources) > 0:
            raise ValueError(f"data.{role}: every weight is 0; give at least one source a positive weight")
        for name, count in Counter(source.name for source in sources).items():
            if count > 1:
                raise ValueError(f"data.{role}: {count} sources are named {name!r}; give each a name of its own with data.{role}.N.name")


def check_curriculum(config: Config) -> None:
    """The weights that change at a step: every source named, in the order of steps."""
    names = [source.name for source in config.data.train]
    before = 0
    for index, change in enumerate(config.data.curriculum):
        where = f"data.curriculum.{index}"
        if change.step <= before:
            needs = f"more than {before}, the step of the change before it" if index else "at least 1; earlier weights stand in data.train"
            raise ValueError(f"{where}.step={change.step}: must be {needs}")
        if set(change.weights) != set(names):
            odd = sorted(set(change.weights) ^ set(names))[0]
            problem = f"{odd!r} has no weight" if odd in names else f"no training source is named {odd!r}"
            raise ValueError(f"{where}.weights={change.weights}: {problem}; give a weight to each of {', '.join(names)}")
        for name, weight in change.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{where}.weights.{name}={weight!r}: must be 0 or more and finite")
        if not math.fsum(change.weights.values()) > 0:
            raise ValueError(f"{where}.weights: every weight is 0; give at least one source a positive weight")
        before = change.step


def check_remote(config: Config) -> None:
    """What remote data sets need."""
    data = config.data
    for role in ("train", "validation"):
        for index, source in enumerate(getattr(data, role)):
            where = f"data.{role}.{index}.path={source.path!r}"
            if source.path.startswith("pipe:") and "{file}" not in source.path:
                raise ValueError(f"{where}: the command must hold {{file}} for a file's name, e.g. pipe:curl -sSf https://host/web/{{file}}")
            if is_remote(source.path) and not data.cache:
                raise ValueError(f"data.cache='': {where} is remote and needs a folder on a local disk, e.g. data.cache=/tmp/swax")
            if is_remote(source.path) and role == "train" and data.damaged == "skip":
                raise ValueError(
                    f"data.damaged='skip': {where} is remote, and which shards are damaged must be known before the first is read; "
                    f"name damaged ones in data.train.{index}.skip_shards, copy the data set to a disk, or use data.damaged=stop"
                )


def validate_inputs(config: Config) -> None:
    """Refuse data folders that are missing or were written with other tokenizers; reads their manifests only."""
    wanted, owner = None, ""
    if config.data.tokenizer is not None:
        owner = f"data.tokenizer={config.data.tokenizer!r}"
        try:
            wanted = hashlib.sha256(Path(config.data.tokenizer).read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{owner} cannot be read ({error.strerror}); train one with data_prep/tokenizer.py") from error
    for role in ("train", "validation"):
        for index, source in enumerate(getattr(config.data, role)):
            where = f"data.{role}.{index}.path"
            found = _source(config, where, source)
            if wanted is not None and found is not None and found != wanted:
                raise ValueError(
                    f"{where}={source.path!r} was tokenised with another tokenizer than {owner}; shard the text again with one tokenizer"
                )
            wanted, owner = wanted or found, owner or f"{where}={source.path!r}"


def _source(config: Config, where: str, source: SourceConfig) -> str | None:
    """The sha256 of the tokenizer that wrote a data set, where its manifest says."""
    manifest = f"{source.path}/manifest.json"
    try:
        content = json.loads(read_file(source.path, "manifest.json", config.data.retries))
    except FileNotFoundError:
        raise ValueError(f"{where}={source.path!r}: no manifest.json there; write the data set with data_prep/shard.py") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}={source.path!r}: {manifest} cannot be read ({error}); write the data set again") from error
    tokenizer = content.get("tokenizer") if isinstance(content, dict) else None
    size = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if size is not None and size != config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the data set {source.path} was tokenised with a vocabulary of {size}; "
            f"use model.vocab_size={size} or shard the text again"
        )
    return tokenizer.get("sha256") if isinstance(tokenizer, dict) else None
