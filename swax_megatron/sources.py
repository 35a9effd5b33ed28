"""Configured data sources -> mixtures, checked against the model's vocabulary."""

from __future__ import annotations

from swax_megatron.data.mixture import Mixture
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SequenceStream
from swax_megatron.schema import Config, SourceConfig


def build_mixture(config: Config, sources: list[SourceConfig], purpose: str, seed: int, tokenizer: str | None = None) -> Mixture:
    """Open the data sets of a list of sources.

    tokenizer: sha256 of the tokenizer they must have been written with; None: the first one's, for all
    Raises ValueError for a damaged or missing data set and for one whose tokenizer does not fit the model or the others.
    """
    datasets = []
    for source in sources:
        dataset = ShardedDataset(source.path, verify=config.data.verify)
        tokenizer = tokenizer or dataset.tokenizer_sha256
        try:
            dataset.check_tokenizer(vocab_size=config.model.vocab_size, sha256=tokenizer)
        except ValueError as error:
            raise ValueError(f"data.{purpose} source {source.name!r}: {error}") from error
        datasets.append(dataset)
    streams = [SequenceStream(dataset, config.data.sequence_length, seed) for dataset in datasets]
    return Mixture(streams, [source.weight for source in sources], [source.name for source in sources], seed)
