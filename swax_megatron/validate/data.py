"""Refusals of the data sources: their values, then the folders they name."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

from swax_megatron.schema import Config, SourceConfig


def check_data(config: Config) -> None:
    data = config.data
    if not data.train:
        raise ValueError("data.train=[]: name at least one data set, e.g. data.train=[{path: data/train}]")
    if config.validation.interval > 0 and not data.validation:
        raise ValueError(
            f"data.validation=[]: validation.interval={config.validation.interval} needs a data set; name one or set validation.interval=0"
        )
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
    manifest = Path(source.path) / "manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
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
