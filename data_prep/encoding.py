"""Turning units of documents into ids, in one process or several, with results in order.

An encoder is anything with ``encode(texts) -> (ids (N,), lengths (D,))`` that gives sentencepiece's ids; a faster one
takes the place of ``SentencePieceEncoder`` in ``make_encoder`` and nowhere else.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from data_prep.readers import Unit, unit_documents
from swax_megatron.data.writer import id_dtype


class Encoder(Protocol):
    """Text to ids without any added token; literal special-token text in a document is plain text."""

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after another, and how many each has."""
        ...


@dataclass(frozen=True)
class EncodeOptions:
    """What a worker needs to know."""

    tokenizer: str
    text_key: str = "text"
    invalid_utf8: str = "error"
    validation_fraction: float = 0.0
    max_document_tokens: int | None = None
    long_documents: str = "error"


@dataclass
class Block:
    """Encoded documents, each with its EOS: ids (N,), lengths (D,), bytes of their UTF-8 text."""

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclass
class Encoded:
    """A unit's documents by split ("train", "validation"), what was skipped, and the bytes read for it."""

    blocks: dict[str, Block] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "invalid_utf8": 0, "too_long": 0})
    input_bytes: int = 0


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model that has an EOS; ValueError where the file is none."""
    if not os.path.isfile(path):
        raise ValueError(f"tokenizer {path} does not exist; train one with data_prep/tokenizer.py")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(Path(path).read_bytes())
    except RuntimeError as error:
        raise ValueError(f"tokenizer {path} is not a SentencePiece model; train one with data_prep/tokenizer.py") from error
    if processor.eos_id() < 0 or processor.unk_id() < 0:
        raise ValueError(f"tokenizer {path} lacks an EOS or UNK id, which documents need; train one with data_prep/tokenizer.py")
    return processor


class SentencePieceEncoder:
    """The reference encoder."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor, self._dtype = processor, id_dtype(processor.vocab_size())

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Encoder``."""
        encoded = self._processor.encode(texts, out_type=int, num_threads=1)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.empty(int(lengths.sum()), self._dtype)
        at = 0
        for document in encoded:
            ids[at : at + len(document)] = document
            at += len(document)
        return ids, lengths


def make_encoder(processor: sentencepiece.SentencePieceProcessor) -> Encoder:
    """The encoder in use."""
    return SentencePieceEncoder(processor)


class UnitEncoder:
    """Encodes one unit after another."""

    def __init__(self, options: EncodeOptions) -> None:
        processor = load_tokenizer(options.tokenizer)
        self._options, self._encoder, self._eos = options, make_encoder(processor), processor.eos_id()

    def __call__(self, unit: Unit) -> Encoded:
        """Parse, encode, append EOS, and split by the hash of each document's text (equal documents stay together)."""
        options, result = self._options, Encoded(input_bytes=unit.input_bytes)
        origins: list[str] = []
        texts: list[str] = []
        for origin, text in unit_documents(unit, options.text_key, options.invalid_utf8):
            if not text:
                result.skipped["invalid_utf8" if text is None else "empty"] += 1
                continue
            origins.append(origin)
            texts.append(text)
        if not texts:
            return result
        plain, lengths = self._encoder.encode(texts)
        keep = self._fitting(lengths + 1, origins)
        result.skipped["too_long"] = int((~keep).sum())
        raw = [text.encode() for text in texts]
        validation = np.array([_in_validation(data, options.validation_fraction) for data in raw])
        ids = np.insert(plain, np.cumsum(lengths), self._eos)
        lengths = lengths + 1
        for split, chosen in (("train", keep & ~validation), ("validation", keep & validation)):
            if chosen.any():
                text_bytes = sum(len(data) for data, wanted in zip(raw, chosen, strict=True) if wanted)
                result.blocks[split] = Block(ids[np.repeat(chosen, lengths)], lengths[chosen], text_bytes)
        return result

    def _fitting(self, lengths: np.ndarray, origins: list[str]) -> np.ndarray:
        limit = self._options.max_document_tokens
        keep = np.ones(len(lengths), bool) if limit is None else lengths <= limit
        if self._options.long_documents == "error" and not keep.all():
            first = int(np.flatnonzero(~keep)[0])
            raise ValueError(
                f"{origins[first]}: {lengths[first]} tokens, more than the {limit} of --max-document-tokens "
                "(by default what one shard holds): raise it to keep the document whole in a larger shard, or use --long-documents skip"
            )
        return keep


def _in_validation(data: bytes, fraction: float) -> bool:
    if not fraction:
        return False
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") < fraction * 2.0**64


class _Worker:
    """A process with an encoder of its own, at the other end of a pipe."""

    def __init__(self, options: EncodeOptions) -> None:
        context = multiprocessing.get_context("spawn")  # inherits nothing: the pipe's end tells the child that its parent is gone
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()

    def encode(self, unit: Unit) -> Encoded:
        """Send a unit and wait for its result; raises the worker's ValueError."""
        try:
            self._pipe.send(unit)
            reply = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise ValueError("a tokenising process died, most likely killed for memory; try fewer --workers") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Let the process end."""
        self._pipe.close()


def _serve(pipe: Connection, options: EncodeOptions) -> None:
    """Encode what comes through the pipe until the parent closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    encoder = UnitEncoder(options)
    try:
        while True:
            unit = pipe.recv()
            try:
                pipe.send(encoder(unit))
            except (ValueError, OSError) as error:
                pipe.send(ValueError(str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def encode_units(units: Iterable[Unit], options: EncodeOptions, workers: int) -> Iterator[Encoded]:
    """Encode units in ``workers`` processes (1: in this one); results come in the order of the units.

    A few units a worker are in memory at once. The first ValueError in the order of the units is raised.
    """
    if workers == 1:
        yield from map(UnitEncoder(options), units)
        return
    load_tokenizer(options.tokenizer)  # a clear error here rather than in every worker
    everyone = [_Worker(options) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in everyone:
        idle.put(worker)

    def encode(unit: Unit) -> Encoded:
        worker = idle.get()
        try:
            return worker.encode(unit)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(workers)  # one a worker, waiting at its pipe
    waiting: deque[Future[Encoded]] = deque()
    try:
        for unit in units:
            waiting.append(threads.submit(encode, unit))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in everyone:
            worker.close()
        for worker in everyone:
            worker.process.join()
