"""Evaluate an export, a checkpoint or a run directory: RULER, recall by gap, loss by position, needles, at any attention window.

Every (task, length) is stored as soon as it is done; the same command goes on where it was stopped. At the end report.md,
results.json and plots are written, and ``python -m swax_megatron.eval.report OUT`` writes them again from what is stored.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from swax_megatron.data.recall import RecallTask
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval import needles, perplexity, recall
from swax_megatron.eval.model import TYPES, Subject, open_subject
from swax_megatron.eval.probe import memory_statistics
from swax_megatron.eval.report import write_report
from swax_megatron.eval.ruler.generate import Materials
from swax_megatron.eval.ruler.run import choose_tasks, run
from swax_megatron.eval.units import Units

EPILOG = """\
examples:
  python -m swax_megatron.eval exports/swax --out evaluations/swax --tasks self-contained --lengths 1024,4096,16384
  python -m swax_megatron.eval runs/1p4b --out evaluations/1p4b --tasks all --lengths 131072 --samples 100 \\
      --essay essays.txt --squad dev-v2.0.json --hotpotqa hotpot_dev_distractor_v1.json --words /usr/share/dict/words
  python -m swax_megatron.eval runs/recall --out evaluations/recall --recall --window 256
  python -m swax_megatron.eval exports/swax --out evaluations/text --data data/validation --position-length 16384
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m swax_megatron.eval", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", help="export folder, checkpoint folder or run directory (its newest checkpoint)")
    made.add_argument("--out", required=True, help="folder for results; continues what it holds")
    made.add_argument("--window", type=int, metavar="W", help="attention window of this evaluation (default: the model's test window)")
    made.add_argument("--dtype", choices=TYPES, help="default: bf16 on a GPU, fp32 on the CPU")
    made.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    made.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, for a checkpoint whose training data are not here")
    made.add_argument("--seed", type=int, default=42, help="of the generated samples (default 42, as RULER)")
    made.add_argument("--tensorboard", action="store_true", help="also write TensorBoard scalars")
    ruler = made.add_argument_group("RULER")
    ruler.add_argument("--tasks", help="comma-separated names, all, or self-contained")
    ruler.add_argument("--lengths", default="4096", help="comma-separated context lengths in tokens, answer included (default 4096)")
    ruler.add_argument("--samples", type=int, default=100, help="samples a task and length (NVIDIA: 500; default 100)")
    ruler.add_argument("--batch", type=int, default=1, help="prompts answered at once (default 1)")
    for name, text in {
        "essay": "essays as plain text, or NVIDIA's PaulGrahamEssays.json",
        "squad": "SQuAD dev-v2.0.json",
        "hotpotqa": "hotpot_dev_distractor_v1.json",
        "words": "a long word list, one a line (cwe above 32k tokens)",
    }.items():
        ruler.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    gap = made.add_argument_group("recall by gap")
    gap.add_argument("--recall", action="store_true", help="for a model trained on rows of data_prep/recall_rows.py")
    gap.add_argument("--recall-lengths", default="1024", help="comma-separated row lengths (default 1024)")
    gap.add_argument("--recall-rows", type=int, default=64, help="rows of each range of gaps (default 64)")
    defaults = RecallTask()
    for name in ("keys", "values", "fillers", "pairs"):
        gap.add_argument(f"--recall-{name}", type=int, default=getattr(defaults, name), help=f"default {getattr(defaults, name)}")
    text = made.add_argument_group("loss by position, needles")
    text.add_argument("--data", help="data set folder, written with the model's tokenizer")
    text.add_argument("--documents", type=int, default=200, help="documents read (default 200)")
    text.add_argument("--position-length", type=int, default=16384, help="tokens read of a document at most (default 16384)")
    text.add_argument("--needles", action="store_true", help="also passages that come back after a gap: the loss that memory saves")
    text.add_argument("--needle-length", type=int, default=1024, help="tokens of a row (default 1024); only documents that long are used")
    text.add_argument("--needle-rows", type=int, default=128, help="rows of each gap (default 128)")
    text.add_argument("--memory", action="store_true", help="also measure horizons, gates, states and attention of every head on --data")
    text.add_argument("--memory-length", type=int, default=2048, help="tokens of a document it reads (default 2048)")
    text.add_argument("--memory-documents", type=int, default=8, help="documents it reads (default 8)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        evaluate(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Run what the options ask for. Raises ValueError, before the model is loaded where that is possible."""
    if not (options.tasks or options.recall or options.data):
        raise ValueError("nothing to evaluate: give --tasks, --recall or --data")
    if options.memory and not options.data:
        raise ValueError("--memory measures a model on documents: give them with --data")
    if options.needles and not options.data:
        raise ValueError("--needles are passages of documents: give them with --data")
    counts = "samples batch recall_rows documents position_length memory_length memory_documents needle_length needle_rows"
    for name in counts.split():
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    materials = Materials(options.essay, options.squad, options.hotpotqa, options.words)
    tasks = choose_tasks(options.tasks.split(","), materials) if options.tasks else []
    lengths = _numbers("--lengths", options.lengths)
    recalls = [_recall_task(options, length) for length in _numbers("--recall-lengths", options.recall_lengths)] if options.recall else []
    dataset = ShardedDataset(options.data) if options.data else None
    cuda = options.device != "cpu" and torch.cuda.is_available()
    dtype = options.dtype or ("bf16" if cuda else "fp32")
    subject = open_subject(options.model, window=options.window, dtype=dtype, device=options.device, tokenizer=options.tokenizer)
    units = Units(options.out, _identity(subject, dtype))
    progress = Lines()
    problems = run(subject, units, tasks, lengths, options.samples, options.batch, materials, options.seed, progress)
    for task in recalls:
        asked = {"task": asdict(task), "rows": options.recall_rows, "seed": options.seed}
        work = partial(recall.by_gap, subject, task, options.recall_rows, options.batch, options.seed, progress)
        units.add(f"recall-{task.length}", "recall", asked, work)
    if dataset is not None:
        data = str(dataset.path)
        length, documents = options.position_length, options.documents
        asked = {"data": data, "length": length, "documents": documents}
        units.add("perplexity", "perplexity", asked, partial(perplexity.by_position, subject, dataset, length, documents, progress))
    if options.needles:
        length, rows = options.needle_length, options.needle_rows
        asked = {"data": data, "rows": rows, "seed": options.seed}
        work = partial(needles.by_gap, subject, dataset, length, rows, options.batch, options.seed, progress)
        units.add(f"needles-{length}", "needles", asked, work)
    if options.memory:
        length, documents = options.memory_length, options.memory_documents
        asked = {"data": data, "length": length, "documents": documents}
        units.add("memory", "memory", asked, partial(memory_statistics, subject, dataset, documents, length, progress))
    print(write_report(options.out, options.tensorboard))
    if problems:
        raise ValueError("; ".join(problems))


class Lines:
    """Progress on stderr, at most every five seconds and at each end."""

    def __init__(self) -> None:
        self.what, self.started, self.last, self.told = "", 0.0, time.monotonic(), 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.started = what, self.last  # what is told of here began when the one before it ended
        self.last = now
        if done == total or now - self.told > 5:
            self.told = now
            rate = done / max(now - self.started, 1e-9)
            print(f"{what}: {done}/{total} · {rate:.2f}/s · ETA {(total - done) / rate:.0f} s", file=sys.stderr, flush=True)


def _identity(subject: Subject, dtype: str) -> dict:
    return {
        "model": subject.name,
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "window": subject.window,
        "dtype": dtype,
    }


def _recall_task(options: argparse.Namespace, length: int) -> RecallTask:
    return RecallTask(
        keys=options.recall_keys, values=options.recall_values, fillers=options.recall_fillers, pairs=options.recall_pairs,
        length=length, near=min(RecallTask().near, length),
    )  # fmt: skip


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 64:
        raise ValueError(f"{option} {text}: give comma-separated lengths of at least 64, e.g. {option} 1024,4096")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
