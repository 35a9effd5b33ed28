"""Train a SentencePiece BPE tokenizer on a corpus: lossless on any UTF-8 text except a literal U+2581."""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from data_prep import cli
from data_prep.readers import DEFAULT_GLOB, Input, iter_units, list_inputs, unit_documents

SENTENCE_BYTES = 4096  # documents are trained on in pieces of about this size, cut after a line's end
_ODD = ("", " ", "  a\t b \n\n\r\n   c ", "<s></s><unk>", "naïve 中文 🙂\u200d🔥 e\u0301 \ufeff\x00\x7f", "12345 x+=1;\n\tif (a<b) {\n")
EPILOG = "example:\n  python data_prep/tokenizer.py --input corpus/*.jsonl --out work/tokenizer.model --vocab-size 32768 --sample-bytes 50M"


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


def sample(inputs: Sequence[Input], text_key: str, invalid_utf8: str, limit: int) -> list[str]:
    """About ``limit`` bytes drawn evenly from the whole corpus, the same every time: the pieces with the smallest hashes."""
    progress = cli.Progress("reading", sum(item.bytes for item in inputs))
    kept: list[tuple[int, int, str, int]] = []
    total = number = 0
    for unit in iter_units(inputs, text_key):
        unit_bytes = documents = 0
        for _, text in unit_documents(unit, text_key, invalid_utf8):
            documents += 1
            for piece in sentences(text or ""):
                size = len(piece.encode())
                key = int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "little")
                number, total, unit_bytes = number + 1, total + size, unit_bytes + size
                heapq.heappush(kept, (-key, number, piece, size))
                while total > limit and len(kept) > 1:
                    total -= heapq.heappop(kept)[3]
        progress.add(unit.input_bytes, unit_bytes, documents)
    progress.finish()
    if not kept:
        raise ValueError("the input holds no text: there is nothing to train a tokenizer on")
    return [piece for _, _, piece, _ in sorted(kept, reverse=True)]


def train(pieces: Sequence[str], vocab_size: int) -> bytes:
    """The serialised model. ValueError where the vocabulary does not fit the text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
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


def check(model: bytes, pieces: Sequence[str]) -> tuple[int, int]:
    """Encode and decode odd strings and a share of the sample; returns its (bytes, tokens). ValueError if a text is changed."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    some = pieces[: max(1, (4 << 20) // SENTENCE_BYTES)]
    tokens = 0
    for text in [*_ODD, *some]:
        ids = processor.encode(text)
        tokens += len(ids)
        if "\u2581" not in text and processor.decode(ids) != text:
            raise ValueError(f"the trained tokenizer does not give back the text {text[:40]!r}: please report this corpus")
    return sum(len(text.encode()) for text in [*_ODD, *some]), tokens


def command(args: argparse.Namespace) -> None:
    """Sample, train, check, write."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists already; choose another --out or add --overwrite")
    inputs = list_inputs(args.input, args.glob)
    pieces = sample(inputs, args.text_key, args.invalid_utf8, args.sample_bytes)
    characters = sum(map(len, pieces)) / 1e6
    print(f"training a {args.model_type} model of {args.vocab_size} ids on {characters:.1f} M characters", file=sys.stderr, flush=True)
    model = train(pieces, args.vocab_size)
    size, tokens = check(model, pieces)
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
    digest = hashlib.sha256(model).hexdigest()
    print(f"{out}: {args.vocab_size} ids, {size / tokens:.3f} bytes a token on {size / 1e6:.1f} MB of the sample, sha256 {digest[:12]}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files or folders, as data_prep/shard.py reads them")
    parser.add_argument("--out", required=True, metavar="FILE", help="the model to write, e.g. tokenizer.model")
    parser.add_argument("--vocab-size", type=cli.positive, default=32768, help="number of ids (default %(default)s)")
    parser.add_argument("--sample-bytes", type=cli.size, default=50 << 20, help="text to train on, drawn evenly (default 50M)")
    parser.add_argument("--model-type", choices=["bpe"], default="bpe", help="the kind that exports exactly to Hugging Face")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text (default %(default)s)")
    kinds = "files to take from folders (default: jsonl, parquet, txt)"
    parser.add_argument("--glob", nargs="+", default=list(DEFAULT_GLOB), metavar="PATTERN", help=kinds)
    parser.add_argument("--invalid-utf8", choices=["error", "skip", "replace"], default="error", help="default %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(command, parser(), argv)


if __name__ == "__main__":
    cli.exit_on_sigterm()
    sys.exit(main())
