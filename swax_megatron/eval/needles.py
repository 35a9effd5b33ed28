"""Needles in real text: a passage comes back a gap later; does a language model remember it?

Every row is a held-out document, cut to ``length`` tokens. In the row of a needle, PASSAGE tokens of another document stand at a random
place and again ``gap`` tokens later; in its control row they stand at the second place alone. Scored are the tokens of the second passage
after its first CUE: in nats a token, and as the share that is guessed right. What a needle lowers the loss by is memory over that gap.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from swax_megatron import randomness
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval.model import Progress, Subject
from swax_megatron.eval.perplexity import every_document

PASSAGE, CUE = 32, 8
FIRST_GAP = 64  # tokens; every further one is twice as large


def gaps(length: int) -> list[int]:
    """64, 128, 256, ... as far as two passages fit into a row."""
    found, gap = [], FIRST_GAP
    while gap + PASSAGE <= length:
        found.append(gap)
        gap *= 2
    return found


def by_gap(subject: Subject, dataset: ShardedDataset, length: int, rows: int, batch: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Loss and share guessed right by gap, with the needle and without, over ``rows`` rows a gap.

    Raises ValueError where the vocabularies differ, no gap fits into ``length``, or fewer than two documents are that long.
    """
    if dataset.vocab_size != subject.model.config.vocab_size:
        raise ValueError(
            f"--data {dataset.path} was tokenised with {dataset.vocab_size} ids, {subject.name} knows "
            f"{subject.model.config.vocab_size}; give a data set written with the model's tokenizer"
        )
    if not gaps(length):
        raise ValueError(f"--needle-length {length}: must be at least {FIRST_GAP + PASSAGE} for one gap of {FIRST_GAP} tokens")
    texts = list(islice((ids[:length] for ids in every_document(dataset) if len(ids) >= length), rows + 1))
    if len(texts) < 2:
        raise ValueError(
            f"--data {dataset.path}: fewer than two documents have {length} tokens; give a smaller --needle-length or more text"
        )
    table = []
    for index, gap in enumerate(gaps(length)):
        sums = np.zeros((2, 2))  # (needle, control) x (nats, right)
        for start in range(0, rows, batch):
            made = [needle(texts, length, gap, seed, number) for number in range(start, min(rows, start + batch))]
            for kind in range(2):
                ids_bt = torch.from_numpy(np.stack([row[kind] for row in made]).astype(np.int64))
                sums[kind] += _score(subject, ids_bt, [row[2] for row in made])
        scored = rows * (PASSAGE - CUE)
        (nats, right), (control_nats, control_right) = (sums / scored).tolist()
        table.append(
            {"gap": gap, "nats": nats, "control_nats": control_nats, "right": right, "control_right": control_right, "tokens": scored}
        )
        progress("needles", index + 1, len(gaps(length)))
    return {"data": str(dataset.path), "length": length, "passage": PASSAGE, "cue": CUE, "rows": rows, "seed": seed, "by_gap": table}


def needle(texts: list[np.ndarray], length: int, gap: int, seed: int, number: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The row with the needle, its control row, and where the second passage begins; all a function of (seed, gap, number)."""
    text = texts[number % len(texts)]
    other = texts[(number + 1) % len(texts)]
    place = randomness.integer("needle place", seed, gap, number) % (length - gap - PASSAGE + 1)
    start = randomness.integer("needle passage", seed, gap, number) % (length - PASSAGE + 1)
    control = text.copy()
    control[place + gap : place + gap + PASSAGE] = other[start : start + PASSAGE]
    row = control.copy()
    row[place : place + PASSAGE] = other[start : start + PASSAGE]
    return row, control, place + gap


def _score(subject: Subject, ids_bt: torch.Tensor, places: list[int]) -> tuple[float, float]:
    """Nats and right guesses, summed over the scored tokens of every row."""
    chosen: list[list[torch.Tensor]] = [[] for _ in places]
    for start, logits in subject.logits(ids_bt[:, :-1]):
        for row, place in enumerate(places):  # the logits at t predict the token at t + 1
            first, last = place + CUE - 1 - start, place + PASSAGE - 1 - start
            if first < logits.shape[1] and last > 0:
                chosen[row].append(logits[row, max(first, 0) : last].float().cpu())
    nats = right = 0.0
    for row, place in enumerate(places):
        logits_nv, target_n = torch.cat(chosen[row]), ids_bt[row, place + CUE : place + PASSAGE]
        nats += float(F.cross_entropy(logits_nv, target_n, reduction="sum"))
        right += float((logits_nv.argmax(-1) == target_n).sum())
    return nats, right
