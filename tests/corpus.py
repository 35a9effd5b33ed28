"""A small tokenised corpus in the real format: short documents of random lengths, learnable, with uneven loss masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swax_megatron.data.writer import DatasetWriter

VOCABULARY = 200  # not a multiple of 128: the padding of the vocabulary takes part


def write_corpus(folder: Path) -> Path:
    """``a`` and ``b`` for training, ``validation``; every folder is a data set. Documents have 3 to 40 ids."""
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(b"a stand-in: these tests train on ids and never decode them")
    for seed, name in enumerate(("a", "b", "validation")):
        target = folder / name
        target.mkdir()
        writer = DatasetWriter(target, VOCABULARY, shard_bytes=8192, member_bytes=1024)
        random = np.random.default_rng(seed)
        for _ in range(800):
            length = int(random.integers(3, 41))
            start, stride = random.integers(3, VOCABULARY), random.integers(1, 4)
            ids = 3 + (start + stride * np.arange(length)) % (VOCABULARY - 3)
            noise = random.random(length) < 0.1
            ids[noise] = random.integers(3, VOCABULARY, noise.sum())
            ids[-1] = 2
            # whole documents without targets, and single ones: microbatches differ much in their number of targets
            mask = (random.random(length) < random.choice([0.05, 0.5, 1.0])).astype(np.uint8)
            writer.add(ids.astype(np.uint16), np.array([length]), mask=mask)
        writer.finish(tokenizer, {"unk_id": 0, "bos_id": 1, "eos_id": 2})
    return folder
