"""Configured data sources -> mixtures, checked against the model's vocabulary."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from swax_megatron.data.cache import FileCache
from swax_megatron.data.mixture import Mixture
from swax_megatron.data.rows import BestFitStream, Team, open_stream
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.storage import is_remote
from swax_megatron.data.stream import SequenceStream
from swax_megatron.schema import Config, SourceConfig

_log = logging.getLogger(__name__)


def build_mixture(config: Config, sources: list[SourceConfig], purpose: str, seed: int, tokenizer: str | None = None) -> Mixture:
    """Open the data sets of a list of sources, for ``purpose`` "train" or "validation".

    tokenizer: sha256 of the tokenizer they must have been written with; None: the first one's, for all
    Raises ValueError for a damaged or missing data set and for one whose tokenizer does not fit the model or the others.
    """
    data, folder = config.data, Path(config.data.cache).expanduser()
    cache = FileCache(folder / "files", int(data.cache_gib * 2**30)) if any(is_remote(source.path) for source in sources) else None
    streams: list[SequenceStream] = []
    for source in sources:
        dataset = _open(config, source, purpose, cache)
        tokenizer = tokenizer or dataset.tokenizer_sha256
        try:
            dataset.check_tokenizer(vocab_size=config.model.vocab_size, sha256=tokenizer)
        except ValueError as error:
            raise ValueError(f"data.{purpose} source {source.name!r}: {error}") from error
        streams.append(open_stream(dataset, data.sequence_length, seed, data.packing, data.shuffle_tokens, folder / "tables", _team()))
        _tell(source, streams[-1])
    if cache is not None:
        fit_cache(config, streams)
    weights, names = [source.weight for source in sources], [source.name for source in sources]
    changes = data.curriculum if purpose == "train" else []
    return Mixture(streams, weights, names, seed, [(change.step, [change.weights[name] for name in names]) for change in changes])


def _open(config: Config, source: SourceConfig, purpose: str, cache: FileCache | None) -> ShardedDataset:
    data, named = config.data, {name: "named in skip_shards" for name in source.skip_shards}
    if data.damaged == "stop" or purpose != "train":
        return ShardedDataset(source.path, data.verify, cache=cache, retries=data.retries, skip=named)
    # every node looks at its files once, and a shard that is damaged on one of them is left out on all
    hashes = int(os.environ.get("LOCAL_RANK", "0")) == 0
    verify = "size" if data.verify == "sha256" and not hashes else data.verify
    dataset = ShardedDataset(source.path, verify, damaged="skip", skip=named)
    if dist.is_initialized():
        every = {name: fault for faults in _gather(dataset.skipped) for name, fault in faults.items()}
        if set(every) != set(dataset.skipped):
            dataset = dataset.without(every)
    return dataset


def _team() -> Team:
    """All ranks, which open every data set together."""
    return Team(dist.get_rank(), dist.get_world_size(), _gather) if dist.is_initialized() else Team()


def _gather(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _tell(source: SourceConfig, stream: SequenceStream) -> None:
    """What a user must know of a source before it is read."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        dataset = stream.dataset
        for name, fault in dataset.skipped.items():
            _log.warning("source %s: shard %s is left out: %s", source.name, name, fault)
        if dataset.skipped:
            lost = sum(entry["tokens"] for entry in dataset.manifest["shards"]) - dataset.tokens
            share = lost / (lost + dataset.tokens)
            _log.warning("source %s: %d shards left out, %d tokens, %.2f %%", source.name, len(dataset.skipped), lost, 100 * share)
        if isinstance(stream, BestFitStream):
            facts = stream.statistics
            _log.info(
                "source %s: best-fit packing, %d rows an epoch, %.2f %% padding, %d documents longer than a row, %d of one id left out",
                source.name,
                facts.rows,
                100 * facts.padding,
                facts.documents_cut,
                facts.documents_left_out,
            )


def fit_cache(config: Config, streams: list[SequenceStream]) -> None:
    """Refuse a cache that cannot hold one shuffle block of every remote source; fetch the next block ahead where two fit.

    streams: of all sources that are read in turn, training and validation.
    """
    remote = [stream for stream in streams if stream.dataset.storage.remote]
    block = sum(stream.block_bytes() for stream in remote)
    limit = config.data.cache_gib * 2**30
    if block > limit:
        raise ValueError(
            f"data.cache_gib={config.data.cache_gib:g}: a shuffle block of the remote sources takes {block / 2**30:.3g} GiB; raise it to "
            f"that, or lower data.shuffle_tokens={config.data.shuffle_tokens} (which makes it another run)"
        )
    for stream in remote:
        stream.look_ahead = 2 if 2 * block <= limit else 1
