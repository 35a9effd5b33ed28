"""Train a SentencePiece tokenizer on a corpus, or import one: lossless on any UTF-8 text except a literal U+2581."""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from data_prep import cli
from data_prep.fetch import local_copy
from data_prep.importing import import_tokenizer
from data_prep.inputs import DEFAULT_GLOB, KINDS, Source, read_sources
from data_prep.readers import Batch, ReadOptions, SegmentReader
from data_prep.segments import Segment, plan

SENTENCE_BYTES = 4096  # documents are trained on in pieces of about this size, cut after a line's end
_CHECKED = 4 << 20  # bytes of the sample that are encoded again
_ODD = ("", " ", "  a\t b \n\n\r\n   c ", "<s></s><unk>", "naïve 中文 🙂\u200d🔥 e\u0301 \ufeff\x00\x7f", "12345 x+=1;\n\tif (a<b) {\n")
_SEGMENT = 1 << 30
EPILOG = """examples:
  python data_prep/tokenizer.py --input corpus/*.jsonl --out work/tokenizer.model --vocab-size 32768 --sample-bytes 50M
  python data_prep/tokenizer.py --import llama2/tokenizer.json --input corpus/ --out work/tokenizer.model"""


def sentences(text: str) -> Iterator[str]:
    """Cut a document into pieces for the trainer, whose memory grows with the length of a sentence; newlines stay."""
    start = 0
    while start < len(text):
        stop = start + SENTENCE_BYTES
        if stop < len(text):
            cut = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start + 1, stop)
            stop = cut if cut > start else stop
        yield text[start:stop]
        start = stop


def batches(sources: Sequence[Source], options: ReadOptions, spool: Path) -> Iterator[tuple[int, Batch]]:
    """The whole corpus as (number of the source, documents); remote files lie in ``spool`` while they are read."""
    reader = SegmentReader(options, lambda item: str(local_copy(item, spool)) if item.remote else item.path)
    for task in plan(sources, _SEGMENT, _SEGMENT):
        index = 0
        while index == 0 or not reader.at_end:
            yield from ((task.source, batch) for batch in reader.read(Segment(task, index)))
            index += 1
        for item in task.inputs:
            if item.remote:
                local_copy(item, spool).unlink()


def sample(sources: Sequence[Source], options: ReadOptions, limit: int, spool: Path) -> list[tuple[int, str]]:
    """About ``limit`` bytes drawn evenly from the whole corpus, the same every time: the pieces with the smallest hashes.

    Each comes with the number of its source. Memory: a few times ``limit``, whatever the size of the corpus.
    """
    tasks = plan(sources, _SEGMENT, _SEGMENT)
    known = all(item.bytes is not None for task in tasks for item in task.inputs)
    progress = cli.Progress("reading", sum(task.bytes for task in tasks) if known else None)
    kept: list[tuple[int, int, str, int, int]] = []
    skipped: Counter[str] = Counter()
    total = number = 0
    for source, batch in batches(sources, options, spool):
        for data in batch.texts:
            for piece in sentences(data.decode()):
                size = len(piece.encode())
                key = int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "little")
                number, total = number + 1, total + size
                heapq.heappush(kept, (-key, number, piece, size, source))
                while total > limit and len(kept) > 1:
                    total -= heapq.heappop(kept)[3]
        skipped.update(batch.skipped)
        progress.add(batch.raw_bytes, batch.size, len(batch.texts))
    progress.finish(f"skipped {', '.join(f'{n} {reason}'.replace('_', ' ') for reason, n in sorted(skipped.items()))}" if skipped else "")
    if not kept:
        raise ValueError("the input holds no text: there is nothing to train a tokenizer on")
    return [(source, piece) for _, _, piece, _, source in sorted(kept, reverse=True)]


def train(pieces: Sequence[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """The serialised model. ValueError where the vocabulary does not fit the text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=8 * SENTENCE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ValueError(f"a vocabulary of {vocab_size} does not fit this text: {reason or error}") from error
    return model.getvalue()


def check(model: bytes, pieces: Sequence[str]) -> None:
    """ValueError if encoding and decoding changes an odd string or a piece of the sample."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    for text in [*_ODD, *pieces[: _CHECKED // SENTENCE_BYTES]]:
        if "\u2581" not in text and processor.decode(processor.encode(text)) != text:
            raise ValueError(
                f"the tokenizer does not give back the text {text[:40]!r}: it normalises text, or lacks byte fallback; use another"
            )


def compression(model: bytes, pieces: Sequence[tuple[int, str]], names: Sequence[str]) -> Iterator[str]:
    """A line a source: bytes a token, and bytes a token of the whole, over at most ``_CHECKED`` bytes of each source."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    whole = [0, 0]
    for number, name in enumerate(names):
        size = tokens = 0
        for source, text in pieces:
            if source == number and size < _CHECKED:
                size, tokens = size + len(text.encode()), tokens + len(processor.encode(text))
        whole = [whole[0] + size, whole[1] + tokens]
        yield f"{name}: {size / tokens:.3f} bytes a token on {size / 1e6:.1f} MB" if tokens else f"{name}: nothing of it is in the sample"
    if len(names) > 1:
        yield f"together: {whole[0] / max(1, whole[1]):.3f} bytes a token on {whole[0] / 1e6:.1f} MB"


def command(args: argparse.Namespace) -> None:
    """Sample, train or import, check, write."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists already; choose another --out or add --overwrite")
    sources = _sources(args)
    options = ReadOptions(args.invalid_utf8, "error", "skip")
    pieces = []
    if sources:
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as spool:
            pieces = sample(sources, options, args.sample_bytes, Path(spool))
    texts = [text for _, text in pieces]
    if args.imported:
        model = import_tokenizer(args.imported, args.eos_token, texts[: _CHECKED // SENTENCE_BYTES])
    else:
        size = sum(map(len, texts)) / 1e6
        print(f"training a {args.model_type} model of {args.vocab_size} ids on {size:.1f} M characters", file=sys.stderr, flush=True)
        model = train(texts, args.vocab_size, args.model_type)
    check(model, texts)
    _write(out, model)
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"{out}: {vocab_size} ids, sha256 {hashlib.sha256(model).hexdigest()[:12]}")
    for line in compression(model, pieces, [source.name for source in sources]):
        print(line)


def _sources(args: argparse.Namespace) -> list[Source]:
    if args.input is not None and args.sources is not None:
        raise ValueError("give the corpus either as --input PATH... or as --sources FILE")
    if args.input is None and args.sources is None and not args.imported:
        raise ValueError("there is nothing to train on: give --input PATH... or --sources FILE, or --import an existing tokenizer")
    if args.sources is not None:
        return read_sources(args.sources)
    return [Source(path, (path,), tuple(args.glob), args.text_key, args.format) for path in args.input or ()]


def _write(out: Path, model: bytes) -> None:
    """Write the model aside and rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(model)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="PATH", help="files, folders or URLs, as data_prep/shard.py reads them")
    parser.add_argument("--sources", metavar="FILE", help="instead of --input: a YAML list of sources, as data_prep/shard.py reads it")
    parser.add_argument("--out", required=True, metavar="FILE", help="the model to write, e.g. tokenizer.model")
    parser.add_argument("--vocab-size", type=cli.positive, default=32768, help="number of ids (default %(default)s)")
    parser.add_argument("--sample-bytes", type=cli.size, default=50 << 20, help="text to train on, drawn evenly (default 50M)")
    kinds = "bpe exports exactly to Hugging Face; unigram does not, and trains ten times longer (default %(default)s)"
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help=kinds)
    imported = "instead of training: a SentencePiece .model, or a Hugging Face tokenizer.json with byte fallback"
    parser.add_argument("--import", dest="imported", metavar="FILE", help=imported)
    parser.add_argument("--eos-token", metavar="TOKEN", help="with --import: the token that ends a document, where its files do not tell")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text (default %(default)s)")
    kinds = "files to take from folders (default: jsonl, parquet, txt, wet)"
    parser.add_argument("--glob", nargs="+", default=list(DEFAULT_GLOB), metavar="PATTERN", help=kinds)
    parser.add_argument("--format", choices=["auto", "text", *KINDS], default="auto", help="of every file (default: by its name)")
    parser.add_argument("--invalid-utf8", choices=["error", "skip", "replace"], default="error", help="default %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(command, parser(), argv)


if __name__ == "__main__":
    cli.exit_on_sigterm()
    sys.exit(main())
