"""Tokenise a corpus into a data set folder: tar shards, an index beside each, tokenizer.model and manifest.json.

Reads JSON lines (plain, .gz, .zst), Parquet, WARC-derived text (.wet[.gz]) and text files (one document a file), local, from
fsspec URLs, or from pipe:COMMAND. A document becomes its ids and EOS. With --validation-fraction, OUT holds two data sets,
OUT/train and OUT/validation; without, OUT is the data set. What is done is kept in OUT.work until OUT is complete: after any
interruption the same command goes on, and the bytes of the result are those of an uninterrupted run with any --workers.
Over several machines: --part I/N on each (I from 1 to N), then --merge once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.assembly import assemble, published
from data_prep.encoders import ENCODERS, load_tokenizer, make_encoder
from data_prep.encoding import EncodeOptions
from data_prep.filters import Filter
from data_prep.inputs import DEFAULT_GLOB, KINDS, Source, read_sources
from data_prep.pool import Pool
from data_prep.readers import ReadOptions
from data_prep.segments import Task, plan, share
from data_prep.workfolder import WorkFolder
from swax_megatron.data.shards import fingerprint
from swax_megatron.data.writer import id_dtype

EPILOG = """examples:
  python data_prep/shard.py --input corpus/ --tokenizer work/tokenizer.model --out data/web --validation-fraction 0.01
  python data_prep/shard.py --input src/ --glob '*.py' '*.rst' --tokenizer work/tokenizer.model --out data/code --deduplicate
  python data_prep/shard.py --sources sources.yaml --tokenizer work/tokenizer.model --out data/all --part 3/16   (and 1/16, 2/16, ...)
  python data_prep/shard.py --sources sources.yaml --tokenizer work/tokenizer.model --out data/all --merge       (after all parts)"""


def command(args: argparse.Namespace) -> None:
    """Encode what is missing, then assemble."""
    sources = _sources(args)
    options = _options(args)
    options.keep.compiled()
    said = _said(args, options, sources)
    out = Path(args.out)
    work = WorkFolder(out, {**said, "input": args.input, "tokenizer": fingerprint(args.tokenizer)})
    tasks = plan(sources, args.shard_size, args.segment_bytes)
    if summary := published(work, tasks):
        print(f"{out}: {summary}")
        return
    if out.exists() and not (args.overwrite or (out.is_dir() and not any(out.iterdir()))):
        raise ValueError(f"{out} exists already; choose another --out or add --overwrite")
    if args.overwrite and out.exists() and not _is_data_set(out):
        raise ValueError(f"{out} exists and is no data set; --overwrite replaces only what this program wrote: choose another --out")
    if args.merge:
        if not work.segments.is_dir():
            raise ValueError(f"--merge finds no {work.path}: run every --part first, with the same options")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
    work.open()
    try:
        _run(args, work, tasks, sources, options, said)
    except BaseException:
        _keep_or_remove(work)
        raise


def _run(args: argparse.Namespace, work: WorkFolder, tasks: list[Task], sources: list[Source], options: EncodeOptions, said: dict) -> None:
    with Pool(options, work, args.workers) as pool:
        if not args.merge:
            _encode(args, work, tasks, pool)
        if args.part and not args.merge:
            part, parts = args.part
            print(f"part {part}/{parts} of {work.out}: done; run --merge when every part is")
            return
        summary = assemble(work, tasks, sources, options, pool, {"options": said})
    print(f"{work.out}: {summary}")


def _encode(args: argparse.Namespace, work: WorkFolder, tasks: list[Task], pool: Pool) -> None:
    """Encode the missing segments of this part."""
    part, parts = args.part or (1, 1)
    todo, bytes_left, known = [], 0, True
    for task, indices in share(tasks, part - 1, parts):
        _, missing = work.finished(task)
        if indices is not None:
            missing = [index for index in missing if index in set(indices)]
        if not missing:
            continue
        known &= all(item.bytes is not None for item in task.inputs)
        if task.segments is None:
            todo.append((task, missing[:-1], missing[-1]))
            bytes_left += task.bytes
        else:
            todo.append((task, missing, None))
            bytes_left += task.bytes * len(missing) // task.segments
    if not todo:
        return
    encoder, sentence = make_encoder(pool.options.tokenizer, pool.options.encoder)
    print(sentence, file=sys.stderr, flush=True)
    pool.options, pool.encoder = replace(pool.options, encoder=encoder.name), encoder
    progress = cli.Progress("sharding", bytes_left if known else None)
    checked = pool.encode(todo, lambda counts: progress.add(counts.raw_bytes, counts.text_bytes, counts.documents))
    progress.finish(f"{checked} documents compared with sentencepiece" if checked else "")


def _keep_or_remove(work: WorkFolder) -> None:
    """Say that finished work is kept, or leave nothing behind where there is none."""
    if not work.segments.is_dir():
        return
    if segments := work.refresh():
        print(f"{segments} finished segments are kept in {work.path}: the same command goes on from there", file=sys.stderr)
    else:
        work.remove_if_empty()


def _is_data_set(folder: Path) -> bool:
    return any((folder / inner / "manifest.json").is_file() for inner in (".", "train", "validation"))


def _sources(args: argparse.Namespace) -> list[Source]:
    if (args.input is None) == (args.sources is None):
        raise ValueError("give the corpus either as --input PATH... or as --sources FILE")
    if args.sources is not None:
        return read_sources(args.sources)
    return [Source(path, (path,), tuple(args.glob), args.text_key, args.format) for path in args.input]


def _options(args: argparse.Namespace) -> EncodeOptions:
    vocab_size = load_tokenizer(args.tokenizer).vocab_size()
    longest = args.max_document_tokens or max(1, args.shard_size // id_dtype(vocab_size).itemsize)
    return EncodeOptions(
        tokenizer=str(args.tokenizer),
        read=ReadOptions(args.invalid_utf8, args.bad_records, args.long_documents, args.max_record_bytes),
        keep=Filter(args.min_text_bytes, args.max_text_bytes, tuple(args.keep_regex), tuple(args.drop_regex)),
        validation_fraction=args.validation_fraction,
        max_document_tokens=longest,
        shard_size=args.shard_size,
        deduplicate=args.deduplicate,
        encoder=args.encoder,
        check_ids=args.check_ids,
    )


def _said(args: argparse.Namespace, options: EncodeOptions, sources: list[Source]) -> dict[str, Any]:
    """The options that decide the content, as JSON; workers, parts and the encoder are none of them."""
    names = ("shard_size", "segment_bytes", "validation_fraction", "deduplicate")
    said = {name: getattr(args, name) for name in names}
    said |= {**asdict(options.read), "max_document_tokens": options.max_document_tokens}
    said |= {f"{name}_regex" if name in ("keep", "drop") else name: value for name, value in asdict(options.keep).items()}
    if args.sources is None:
        said |= {"text_key": args.text_key, "glob": list(args.glob), "format": args.format}
    else:
        said["sources"] = [{key: value for key, value in asdict(source).items() if key != "notes"} for source in sources]
    return said


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: write I/N with I from 1 to N, such as 3/16")
    return int(match[1]), int(match[2])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--input", nargs="+", metavar="PATH", help="files, folders (walked in sorted order), URLs, pipe:COMMAND")
    corpus.add_argument("--sources", metavar="FILE", help="instead of --input: a YAML list of {name, input, glob, text_key, format, ...}")
    corpus.add_argument("--text-key", default="text", help="key or column that holds the text (default %(default)s)")
    kinds = "files to take from folders (default: jsonl, parquet, txt, wet)"
    corpus.add_argument("--glob", nargs="+", default=list(DEFAULT_GLOB), metavar="PATTERN", help=kinds)
    corpus.add_argument("--format", choices=["auto", "text", *KINDS], default="auto", help="of every file (default: by its name)")
    output = parser.add_argument_group("output")
    output.add_argument("--tokenizer", required=True, metavar="MODEL", help="a SentencePiece model, e.g. from data_prep/tokenizer.py")
    output.add_argument("--out", required=True, metavar="DIR", help="the folder to write; appears when it is complete")
    output.add_argument("--shard-size", type=cli.size, default=64 << 20, help="target size of a tar (default 64M)")
    output.add_argument("--validation-fraction", type=cli.fraction, default=0.0, help="share of documents for OUT/validation, by hash")
    output.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    choice = parser.add_argument_group("which documents")
    choice.add_argument("--deduplicate", action="store_true", help="of documents with equal text keep the first")
    choice.add_argument("--min-text-bytes", type=cli.size, default=1, metavar="SIZE", help="skip shorter documents")
    choice.add_argument("--max-text-bytes", type=cli.size, metavar="SIZE", help="skip longer documents")
    choice.add_argument("--keep-regex", nargs="+", default=[], metavar="REGEX", help="skip documents in which none of these is found")
    choice.add_argument("--drop-regex", nargs="+", default=[], metavar="REGEX", help="skip documents in which one of these is found")
    choice.add_argument("--invalid-utf8", choices=["error", "skip", "replace"], default="error", help="default %(default)s")
    choice.add_argument("--bad-records", choices=["error", "skip"], default="error", help="broken JSON, missing text (default %(default)s)")
    choice.add_argument("--max-document-tokens", type=cli.positive, help="longest document allowed, EOS included (default: one shard)")
    choice.add_argument("--max-record-bytes", type=cli.size, default=64 << 20, help="longest line, cell or file (default 64M)")
    choice.add_argument("--long-documents", choices=["error", "skip"], default="error", help="default %(default)s")
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=cli.positive, default=os.cpu_count() or 1, help="processes; the output is the same for any")
    work.add_argument("--part", type=_part, metavar="I/N", help="encode only share I (from 1) of N; then --merge")
    work.add_argument("--merge", action="store_true", help="after all parts: write OUT")
    work.add_argument("--segment-bytes", type=cli.size, help="input worked on at once; decides the bytes (default: by the input)")
    work.add_argument("--encoder", choices=ENCODERS, default="auto", help="what encodes; the ids are the same (default %(default)s)")
    work.add_argument("--check-ids", type=cli.share, default=0.002, help="share of documents to compare (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(command, parser(), argv)


if __name__ == "__main__":
    cli.exit_on_sigterm()
    sys.exit(main())
