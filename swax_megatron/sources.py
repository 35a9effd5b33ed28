"""Configured data sources -> mixtures, checked against the model's vocabulary."""

from __future__ import annotations

from swax_megatron.config import Config, SourceConfig
from swax_megatron.data.mixture import Mixture
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SequenceStream


def build_mixture(config: Config, sources: list[SourceConfig], purpose: str) -> Mixture:
    """Open the data sets of a list of sources.

    Raises ValueError for a damaged or missing data set and for one whose tokenizer does not fit the model or the others.
    """
    datasets = []
    for source in sources:
        dataset = ShardedDataset(source.path, verify=config.data.verify)
        try:
            dataset.check_tokenizer(vocab_size=config.model.vocab_size, sha256=datasets[0].tokenizer_sha256 if datasets else None)
        except ValueError as error:
            raise ValueError(f"data.{purpose} source {source.name!r}: {error}") from error
        datasets.append(dataset)
    streams = [SequenceStream(dataset, config.data.sequence_length, config.train.data_seed) for dataset in datasets]
    return Mixture(streams, [source.weight for source in sources], [source.name for source in sources], config.train.data_seed)
