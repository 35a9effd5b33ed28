"""Write rows of the recall task (swax_megatron/data/recall.py) as data sets: OUT/train and OUT/validation.

A row is one document of LENGTH ids, so that a run with data.sequence_length=LENGTH reads exactly one row at a time; only
the values asked for are training targets. Row i is a pure function of the seed and i.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import cli
from swax_megatron.data.recall import EOS, RecallTask, make_row
from swax_megatron.data.writer import DatasetWriter

EXAMPLE = """\
example:
  python data_prep/recall_rows.py --out data/recall --rows 200000 --length 1024 --pairs 24 --near 256 --far-fraction 0.02
"""
VALIDATION_FROM = 1 << 40  # row numbers of the validation set: never reached by training rows
BLOCK = 1024  # rows of one member of a tar, and of one job of a worker


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train/ and validation/; must not exist")
    parser.add_argument("--rows", type=cli.positive, required=True, help="training rows")
    parser.add_argument("--validation-rows", type=cli.positive, default=512, help="default 512")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--far-fraction", type=float, default=RecallTask.far_fraction, help="share of gaps beyond --near")
    parser.add_argument("--workers", type=cli.positive, default=os.cpu_count(), help="processes; what is written does not depend on them")
    for name in ("keys", "values", "fillers", "pairs", "length", "near"):
        parser.add_argument(f"--{name}", type=cli.positive, default=getattr(RecallTask, name), help=f"default {getattr(RecallTask, name)}")
    return cli.run(write, parser, argv)


def write(options: argparse.Namespace) -> None:
    """Write both data sets aside, then rename the folder."""
    task = RecallTask(
        options.keys, options.values, options.fillers, options.pairs, options.length, options.near, options.far_fraction
    )
    if options.out.exists():
        raise ValueError(f"--out {options.out} exists already: name another folder, or delete it")
    aside = options.out.with_name(f"{options.out.name}.tmp-{os.getpid()}")
    try:
        for role, first, rows in (("train", 0, options.rows), ("validation", VALIDATION_FROM, options.validation_rows)):
            folder = aside / role
            folder.mkdir(parents=True)
            vocabulary = aside / "vocabulary.json"
            vocabulary.write_text(json.dumps({"recall": vars(task)}, sort_keys=True), encoding="utf-8")
            writer = DatasetWriter(folder, task.vocabulary)
            blocks, done = [range(start, min(first + rows, start + BLOCK)) for start in range(first, first + rows, BLOCK)], 0
            with multiprocessing.get_context("spawn").Pool(min(options.workers, len(blocks))) as pool:
                for ids, mask in pool.imap(partial(_block, task, options.seed), blocks):
                    lengths = np.full(len(ids) // task.length, task.length)
                    writer.add(ids, lengths, mask=mask)
                    done += len(lengths)
                    print(f"\r{role}: {done:,}/{rows:,} rows", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            writer.finish(vocabulary, {"unk_id": 0, "bos_id": 1, "eos_id": EOS}, recall=vars(task), seed=options.seed)
        (aside / "vocabulary.json").unlink()
        aside.rename(options.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _block(task: RecallTask, seed: int, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask of these rows, one after another."""
    made = [make_row(task, seed, number) for number in numbers]
    kind = np.uint16 if task.vocabulary <= 1 << 16 else np.uint32  # as they are stored: little to send
    return np.concatenate([row.ids for row in made]).astype(kind), np.concatenate([row.mask for row in made])


if __name__ == "__main__":
    sys.exit(main())
