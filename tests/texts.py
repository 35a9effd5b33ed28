"""Small texts, a small tokenizer and small data sets for the tests of the data pipeline."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep import shard, tokenizer
from swax_megatron.data.writer import DatasetWriter

EOS = 2
ODD_TEXTS = [
    " ",
    "\n",
    "\t\t",
    "  leading, trailing  ",
    "tabs\tand\r\nline ends\n\n\n    indented",
    "a   b      c",
    "\x00 a NUL, \x1b an escape, \x7f a delete",
    "<s> </s> <unk> <0x41> are plain text",
    "naïve façade — “quotes” … ﬁ Å Å e\u0301",
    "中文，日本語、한국어 ไทย עברית العربية हिन्दी",
    "🙂 👩\u200d👩\u200d👧 \U0010ffff \ufffd \ufeff \u200b \u00a0 \u3000 \u2028",
    "\u2047 looks like sentencepiece's unknown",
    "x" * 5000,
    "0123456789 3.14159",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 120 made-up words in lines, all different."""
    source = random.Random(seed)
    words = ["".join(source.choices("aeioubcdfgklmnprstvz", k=source.randint(1, 9))) for _ in range(300)]
    documents = []
    for number in range(count):
        body = " ".join(source.choices(words, k=source.randint(1, 120)))
        documents.append(f"{number} {body}.\n" if number % 3 else f"def f{number}():\n    return {body!r}\n")
    return documents


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    """One {"text": ...} a line."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
    return path


def small_tokenizer(folder: Path) -> Path:
    """A tokenizer of 400 ids, trained through the command line's own entry."""
    source = write_jsonl(folder / "tokenizer_text.jsonl", [*texts(200), *ODD_TEXTS])
    out = folder / "tokenizer.model"
    assert tokenizer.main(["--input", str(source), "--out", str(out), "--vocab-size", "400"]) == 0
    return out


def run_shard(source: Path | Sequence[Path], model: Path, out: Path, *options: str) -> int:
    """data_prep/shard.py in this process with one worker; returns its exit status."""
    sources = [source] if isinstance(source, Path) else source
    return shard.main(["--input", *map(str, sources), "--tokenizer", str(model), "--out", str(out), "--workers", "1", *options])


def write_ids(
    folder: Path,
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]] | None = None,
    vocab_size: int = 300,
    shard_bytes: int = 4096,
) -> Path:
    """A data set of given ids, each document ending in EOS; members of about 256 ids."""
    folder.mkdir(parents=True)
    model = folder.parent / "stand-in.model"
    model.write_bytes(b"not read by tests that work on ids")
    writer = DatasetWriter(folder, vocab_size, shard_bytes=shard_bytes, member_bytes=512)
    for number, ids in enumerate(documents):
        mask = None if masks is None else np.array(masks[number])
        writer.add(np.array(ids), np.array([len(ids)]), text_bytes=3 * len(ids), mask=mask)
    writer.finish(model, {"unk_id": 0, "bos_id": 1, "eos_id": EOS})
    return folder


def random_documents(count: int, seed: int = 0, longest: int = 60, vocab_size: int = 300) -> list[list[int]]:
    """Documents of 1 to ``longest`` ids, the last an EOS."""
    source = np.random.default_rng(seed)
    return [[*source.integers(3, vocab_size, int(source.integers(0, longest))).tolist(), EOS] for _ in range(count)]
