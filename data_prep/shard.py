"""Tokenise a corpus into a data set folder: tar shards, an index beside each, tokenizer.model and manifest.json.

Reads JSON lines (plain, .gz, .zst), Parquet, and text files (one document a file). A document becomes its ids and EOS.
With --validation-fraction, OUT holds two data sets, OUT/train and OUT/validation; without, OUT is the data set.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.encoding import EncodeOptions, encode_units, load_tokenizer
from data_prep.readers import DEFAULT_GLOB, Input, iter_units, list_inputs
from swax_megatron.data.writer import DatasetWriter, id_dtype, sync_folder

EPILOG = """examples:
  python data_prep/shard.py --input corpus/ --tokenizer work/tokenizer.model --out data/web --validation-fraction 0.01
  python data_prep/shard.py --input src/ --glob '*.py' '*.rst' --tokenizer work/tokenizer.model --out data/code"""


def command(args: argparse.Namespace) -> None:
    """Write everything aside, then rename."""
    out = Path(args.out)
    if out.exists() and not (args.overwrite or (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} exists already; choose another --out or add --overwrite")
    if args.overwrite and out.exists() and not _is_data_set(out):
        raise ValueError(f"{out} exists and is no data set; --overwrite replaces only what this program wrote: choose another --out")
    inputs = list_inputs(args.input, args.glob)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir()
        summary = _write(args, inputs, aside)
        _publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{out}: {summary}")


def _is_data_set(folder: Path) -> bool:
    return any((folder / inner / "manifest.json").is_file() for inner in (".", "train", "validation"))


def _publish(aside: Path, out: Path) -> None:
    """Rename the finished folder to its name; an old one leaves first and is removed last."""
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        os.rename(out, old)
    os.rename(aside, out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(args: argparse.Namespace, inputs: list[Input], aside: Path) -> str:
    processor = load_tokenizer(args.tokenizer)
    if args.max_document_tokens is None:
        args.max_document_tokens = max(1, args.shard_size // id_dtype(processor.vocab_size()).itemsize)
    options = EncodeOptions(
        str(args.tokenizer), args.text_key, args.invalid_utf8, args.validation_fraction, args.max_document_tokens, args.long_documents
    )
    folders = {"train": aside / "train", "validation": aside / "validation"} if args.validation_fraction else {"train": aside}
    writers = {}
    for split, folder in folders.items():
        folder.mkdir(exist_ok=True)
        writers[split] = DatasetWriter(folder, processor.vocab_size(), args.shard_size)
    skipped = {"empty": 0, "invalid_utf8": 0, "too_long": 0}
    progress = cli.Progress("sharding", sum(item.bytes for item in inputs))
    try:
        for encoded in encode_units(iter_units(inputs, args.text_key), options, args.workers):
            for split, block in encoded.blocks.items():
                writers[split].add(block.ids, block.lengths, text_bytes=block.text_bytes)
            skipped = {reason: count + encoded.skipped[reason] for reason, count in skipped.items()}
            blocks = encoded.blocks.values()
            progress.add(encoded.input_bytes, sum(block.text_bytes for block in blocks), sum(len(block.lengths) for block in blocks))
        progress.finish()
        _refuse_empty(writers, skipped, args.validation_fraction)
        special = {"unk_id": processor.unk_id(), "bos_id": processor.bos_id(), "eos_id": processor.eos_id()}
        for split, writer in writers.items():
            notes = {"sources": _sources(args.input, inputs), "options": _options(args, split), "skipped": skipped}
            writer.finish(args.tokenizer, special, **notes)
    finally:
        for writer in writers.values():
            writer.abort()
    counts = [f"{split} {writer.documents} documents, {writer.tokens} tokens" for split, writer in writers.items()]
    left_out = [f"{count} {reason.replace('_', ' ')}" for reason, count in skipped.items() if count]
    return "; ".join(counts) + (f"; skipped {', '.join(left_out)}" if left_out else "")


def _refuse_empty(writers: dict[str, DatasetWriter], skipped: dict[str, int], fraction: float) -> None:
    total = sum(writer.documents for writer in writers.values())
    if not total:
        raise ValueError(f"the input holds no document (skipped: {', '.join(f'{count} {reason}' for reason, count in skipped.items())})")
    for split, writer in writers.items():
        if not writer.documents:
            raise ValueError(f"--validation-fraction {fraction} of {total} documents leaves the {split} set empty; choose another fraction")


def _sources(paths: Sequence[str], inputs: list[Input]) -> list[dict[str, Any]]:
    """What was read, an entry for each --input."""
    sources = []
    for path in paths:
        files = [item for item in inputs if item.path == path or item.path.startswith(os.path.join(path, ""))]
        sources.append({"path": path, "files": len(files), "bytes": sum(item.bytes for item in files)})
    return sources


def _options(args: argparse.Namespace, split: str) -> dict[str, Any]:
    """The options that decide the content; the number of workers is none of them."""
    names = ("text_key", "glob", "shard_size", "validation_fraction", "invalid_utf8", "max_document_tokens", "long_documents")
    return {"split": split, **{name: getattr(args, name) for name in names}}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, or folders that are walked in sorted order")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="a SentencePiece model, e.g. from data_prep/tokenizer.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; appears when it is complete")
    parser.add_argument("--workers", type=cli.positive, default=os.cpu_count() or 1, help="processes; the output is the same for any")
    parser.add_argument("--shard-size", type=cli.size, default=64 << 20, help="target size of a tar (default 64M)")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text (default %(default)s)")
    kinds = "files to take from folders (default: jsonl, parquet, txt)"
    parser.add_argument("--glob", nargs="+", default=list(DEFAULT_GLOB), metavar="PATTERN", help=kinds)
    parser.add_argument("--validation-fraction", type=cli.fraction, default=0.0, help="share of documents for OUT/validation, by hash")
    parser.add_argument("--invalid-utf8", choices=["error", "skip", "replace"], default="error", help="default %(default)s")
    parser.add_argument("--max-document-tokens", type=cli.positive, help="longest document allowed, EOS included (default: one shard)")
    parser.add_argument("--long-documents", choices=["error", "skip"], default="error", help="default %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(command, parser(), argv)


if __name__ == "__main__":
    cli.exit_on_sigterm()
    sys.exit(main())
