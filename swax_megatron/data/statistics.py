"""Counts over a whole data set: yardsticks that a trained model must beat."""

from __future__ import annotations

import numpy as np

from swax_megatron.data.shards import ShardedDataset


def corpus_token_counts(dataset: ShardedDataset) -> np.ndarray:
    """How often each id occurs, EOS included: (vocab_size,) int64. Reads every shard once."""
    counts = np.zeros(dataset.vocab_size, np.int64)
    for shard in range(len(dataset.shards)):
        for block in dataset.blocks(shard):
            counts += np.bincount(block, minlength=dataset.vocab_size)
    return counts


def unigram_entropy(dataset: ShardedDataset) -> float:
    """Entropy of the id frequencies in nats a token: the loss of the best model that ignores all context."""
    counts = corpus_token_counts(dataset)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
