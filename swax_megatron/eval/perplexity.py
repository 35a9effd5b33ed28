"""Loss by position and by document length: does a model use what lies beyond its window?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from swax_megatron.data.positions import position_edges
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval.model import Progress, Subject


def by_position(subject: Subject, dataset: ShardedDataset, length: int, documents: int, progress: Progress) -> dict[str, Any]:
    """Mean loss (nats per token) by position and by document length, over the first ``documents`` documents.

    A document is cut after ``length`` tokens. Each starts from an empty memory.
    Raises ValueError where the vocabularies differ.
    """
    if dataset.vocab_size != subject.model.config.vocab_size:
        raise ValueError(
            f"--data {dataset.path} was tokenised with {dataset.vocab_size} ids, {subject.name} knows "
            f"{subject.model.config.vocab_size}; give a data set written with the model's tokenizer"
        )
    edges = position_edges(length)
    by_position, by_length = _Sums(edges), _Sums(edges)
    beyond = 0
    chosen = islice(every_document(dataset), documents)
    total = min(documents, dataset.documents)
    for done, document in enumerate(chosen, 1):
        ids = document[: length + 1]
        if len(ids) > 1:
            nats = token_losses(subject, torch.from_numpy(ids.astype(np.int64))[None])[0]
            by_position.add(np.arange(len(nats)), nats)
            by_length.add(np.full(len(nats), len(nats) - 1), nats)
            beyond += max(0, len(nats) - subject.window)
        progress("perplexity", done, total)
    tokens = int(by_position.counts.sum())
    if not tokens:
        raise ValueError(f"--data {dataset.path}: its first {total} documents have no token to predict; give more with --documents")
    return {
        "data": str(dataset.path),
        "documents": total,
        "length": length,
        "nats": float(by_position.losses.sum() / tokens),
        "share_beyond_window": beyond / tokens,
        "by_position": by_position.table(),
        "by_document_length": by_length.table(),
    }


class _Sums:
    """Losses summed by bucket."""

    def __init__(self, edges: list[int]) -> None:
        self.edges, self.losses, self.counts = edges, np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)

    def add(self, values: np.ndarray, nats: np.ndarray) -> None:
        bucket = np.searchsorted(self.edges, values, side="right") - 1
        np.add.at(self.losses, bucket, nats)
        np.add.at(self.counts, bucket, 1)

    def table(self) -> list[dict[str, Any]]:
        rows = zip(self.edges, self.edges[1:], self.losses, self.counts, strict=False)
        return [{"from": a, "to": b, "nats": float(loss / n), "tokens": int(n)} for a, b, loss, n in rows if n]


def every_document(dataset: ShardedDataset) -> Iterator[np.ndarray]:
    """Ids of every document in stored order."""
    for shard in range(len(dataset.shards)):
        for number in range(len(dataset.index(shard).lengths)):
            yield dataset.document(shard, number)


def token_losses(subject: Subject, ids_bt: torch.Tensor) -> np.ndarray:
    """(b, t - 1) nats of every next token."""
    parts = []
    for start, logits in subject.logits(ids_bt[:, :-1]):
        target = ids_bt[:, start + 1 : start + 1 + logits.shape[1]].to(logits.device)
        parts.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none").cpu())
    return torch.cat(parts, 1).double().numpy()
