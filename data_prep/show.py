"""Look into a data set folder: counts, lengths of the documents, decoded samples."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import cli
from data_prep.encoders import load_tokenizer
from data_prep.verify import data_sets
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.statistics import unigram_entropy
from swax_megatron.randomness import integer

EPILOG = "example:\n  python data_prep/show.py data/web --samples 3 --characters 400 --png lengths.png"
_BAR = 50
_OCTAVES = 40  # lengths up to 2^40


@dataclass(frozen=True)
class Lengths:
    """Documents and their tokens by length: ``documents`` and ``tokens`` (K,) int64, of lengths from ``EDGES``[k] up to the next one."""

    documents: np.ndarray
    tokens: np.ndarray


def _edges() -> np.ndarray:
    """Whole numbers that grow by a 16th of an octave, where that is a token or more; every power of two among them."""
    return np.unique(np.round(2.0 ** (np.arange(_OCTAVES * 16 + 1) / 16))).astype(np.int64)


EDGES = _edges()


def lengths_of(dataset: ShardedDataset) -> Lengths:
    """Added up shard by shard, so that memory does not grow with the number of documents."""
    documents, tokens = np.zeros(len(EDGES), np.int64), np.zeros(len(EDGES), np.int64)
    for shard in range(len(dataset.shards)):
        lengths = dataset.index(shard).lengths
        bins = np.searchsorted(EDGES, lengths, side="right") - 1
        np.add.at(documents, bins, 1)
        np.add.at(tokens, bins, lengths)
    return Lengths(documents, tokens)


def histogram(lengths: Lengths) -> str:
    """Documents and share of the tokens by length, in powers of two."""
    powers = np.frexp(EDGES)[1] - 1
    filled = powers[lengths.documents > 0]
    lines = ["document length (tokens)    documents   % of tokens"]
    for power in range(int(filled.min()), int(filled.max()) + 1):
        inside = powers == power
        share = lengths.tokens[inside].sum() / lengths.tokens.sum()
        bar = "#" * round(_BAR * share)
        documents = int(lengths.documents[inside].sum())
        lines.append(f"{2**power:>10} - {2 ** (power + 1) - 1:<10} {documents:>12} {100 * share:>12.2f}  {bar}".rstrip())
    return "\n".join(lines)


def plot(datasets: Sequence[ShardedDataset], path: Path) -> None:
    """Write a PNG: documents and tokens by the length of the document, a curve for each data set."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--png needs matplotlib: pip install 'swax_megatron[show]'") from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, weigh, title in zip(figure.subplots(2, 1, sharex=True), (False, True), ("documents", "tokens"), strict=True):
        for dataset in datasets:
            lengths = lengths_of(dataset)
            counts = lengths.tokens if weigh else lengths.documents
            last = int(np.flatnonzero(counts)[-1]) + 1
            octaves = np.diff(np.log2(EDGES[: last + 1]))  # short lengths have wider bins: a token is an octave of its own
            axes.stairs(100 * counts[:last] / counts.sum() / octaves, EDGES[: last + 1], label=str(dataset.path))
        axes.set_xscale("log")
        axes.set_ylabel(f"% of {title} in an octave")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    axes.set_xlabel("length of the document in tokens, EOS included")
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, path)


def describe(dataset: ShardedDataset, samples: int, characters: int, seed: int, entropy: bool) -> None:
    """Print one data set."""
    processor = load_tokenizer(dataset.tokenizer_path)
    print(f"{dataset.path}: {dataset.documents} documents, {dataset.tokens} tokens ({dataset.dtype.name}) in {len(dataset.shards)} shards")
    if dataset.text_bytes:
        print(f"{dataset.text_bytes} bytes of text, {dataset.tokens / dataset.text_bytes:.4f} tokens a byte, EOS included")
    for source in dataset.manifest.get("sources", []):
        if source.get("text_bytes"):
            share = f"{source['documents']} documents, {source['tokens'] / source['text_bytes']:.4f} tokens a byte"
            print(f"  {source['name']}: {share}, {100 * source['tokens'] / dataset.tokens:.1f} % of the tokens")
    skipped = {reason: count for reason, count in dataset.manifest.get("skipped", {}).items() if count}
    print(f"tokenizer {dataset.tokenizer_sha256[:12]}, {dataset.vocab_size} ids; skipped: {skipped or 'none'}")
    if entropy:
        print(f"unigram entropy {unigram_entropy(dataset):.4f} nats a token")
    print(histogram(lengths_of(dataset)))
    ends = np.cumsum(dataset.shard_documents)
    for sample in range(samples):
        number = integer("show", seed, sample) % dataset.documents
        shard = int(np.searchsorted(ends, number, side="right"))
        within = number - (int(ends[shard - 1]) if shard else 0)
        ids = dataset.document(shard, within)
        text = processor.decode(ids[: 4 * characters].tolist())
        print(f"--- shard {shard}, document {within}, {len(ids)} tokens\n{text[:characters]}")


def command(args: argparse.Namespace) -> None:
    """Print every data set in the folder."""
    datasets = [ShardedDataset(folder) for folder in data_sets(args.folder)]
    for dataset in datasets:
        describe(dataset, args.samples, args.characters, args.seed, args.entropy)
    if args.png:
        plot(datasets, Path(args.png))
        print(f"lengths drawn in {args.png}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a data set folder, or one that holds train and validation")
    parser.add_argument("--samples", type=int, default=3, help="documents to print (default %(default)s)")
    parser.add_argument("--characters", type=cli.positive, default=400, help="characters of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which documents (default %(default)s)")
    parser.add_argument("--png", metavar="FILE", help="draw the lengths of the documents")
    parser.add_argument("--entropy", action="store_true", help="also print the unigram entropy (reads every shard)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(command, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
