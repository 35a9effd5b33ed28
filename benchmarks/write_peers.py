"""The peers of benchmarks/data_write.py: tokenise JSON lines with another library's writer. Runs in the peers' environment, alone.

tokenizers: Hugging Face's encode_batch over all threads, ids into one file. litdata: ``optimize``. mds: MosaicML's ``MDSWriter``,
a folder a process. The last two encode with sentencepiece.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

EPILOG = """example:
  peers/bin/python -m benchmarks.write_peers mds --input corpus.jsonl --tokenizer tokenizer.model --out /tmp/mds --workers 2"""


def texts(path: str, part: int = 0, parts: int = 1) -> Any:
    """The texts of every ``parts``-th line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number % parts == part:
                yield json.loads(line)["text"]


def with_tokenizers(args: argparse.Namespace) -> int:
    """Batches of 256 documents through encode_batch, which uses ``workers`` threads."""
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(args.tokenizer)
    tokens, batch = 0, []
    with open(args.out / "ids.bin", "wb") as file:

        def write() -> int:
            count = 0
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.array([*encoding.ids, 2], np.uint16)
                file.write(ids.tobytes())
                count += len(ids)
            batch.clear()
            return count

        for text in texts(args.input):
            batch.append(text)
            if len(batch) == 256:
                tokens += write()
        return tokens + write()


def _ids(processor: Any, text: str) -> np.ndarray:
    return np.array([*processor.encode(text), 2], np.uint16)


def _litdata_documents(part: tuple[int, int], path: str, tokenizer: str) -> Any:
    import sentencepiece
    import torch

    processor = sentencepiece.SentencePieceProcessor(tokenizer)
    for text in texts(path, *part):
        yield torch.from_numpy(_ids(processor, text).astype(np.int32))


def with_litdata(args: argparse.Namespace) -> None:
    """``optimize`` with a document an item."""
    import litdata

    parts = [(part, args.workers) for part in range(args.workers)]
    function = partial(_litdata_documents, path=args.input, tokenizer=args.tokenizer)
    litdata.optimize(fn=function, inputs=parts, output_dir=str(args.out), num_workers=args.workers, chunk_bytes="64MB")


def _write_mds(part: int, args: argparse.Namespace) -> int:
    import sentencepiece
    from streaming import MDSWriter

    processor, tokens = sentencepiece.SentencePieceProcessor(args.tokenizer), 0
    with MDSWriter(out=str(args.out / str(part)), columns={"tokens": "ndarray:uint16"}, size_limit=64 << 20) as writer:
        for text in texts(args.input, part, args.workers):
            ids = _ids(processor, text)
            writer.write({"tokens": ids})
            tokens += len(ids)
    return tokens


def with_mds(args: argparse.Namespace) -> int:
    """A writer in each process."""
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        return sum(pool.map(partial(_write_mds, args=args), range(args.workers)))


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["tokenizers", "litdata", "mds"])
    parser.add_argument("--input", required=True, help="JSON lines with a key text")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json for tokenizers, else a SentencePiece model")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    tokens = {"tokenizers": with_tokenizers, "litdata": with_litdata, "mds": with_mds}[args.kind](args)
    if tokens is not None:
        (args.out / "tokens.txt").write_text(str(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
