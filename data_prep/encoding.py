"""From a segment of the corpus to its shards in a folder of the work folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.duplicates import FINGERPRINTS, document_fingerprints
from data_prep.encoders import Encoder, SampleCheck, SentencePieceEncoder, load_tokenizer, make_encoder
from data_prep.fetch import local_copy
from data_prep.filters import Filter
from data_prep.inputs import Input
from data_prep.readers import Batch, ReadOptions, SegmentReader
from data_prep.segments import Segment
from data_prep.workfolder import WorkFolder
from swax_megatron.data.writer import ShardWriter, id_dtype, write_synced

SPLITS = ("train", "validation")
SKIPPED = ("empty", "invalid_utf8", "malformed", "too_short", "too_long", "filtered", "duplicate")


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the content of the shards, and how it is made."""

    tokenizer: str
    read: ReadOptions = field(default_factory=ReadOptions)
    keep: Filter = field(default_factory=Filter)
    validation_fraction: float = 0.0
    max_document_tokens: int | None = None
    shard_size: int = 64 << 20
    deduplicate: bool = False
    encoder: str = "auto"
    check_ids: float = 0.0


@dataclass
class Counts:
    """What a segment has given so far: bytes of input, bytes of text, documents."""

    raw_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0


class SegmentEncoder:
    """Reads, filters, encodes and writes segments, one after another. The encoder of ``options`` was tried by the caller."""

    def __init__(self, options: EncodeOptions, work: WorkFolder, encoder: Encoder | None = None) -> None:
        """encoder: that of ``options``, where it was made already."""
        processor = load_tokenizer(options.tokenizer)
        self._options, self._work = options, work
        self._encoder = encoder or make_encoder(options.tokenizer, options.encoder, compare=False)[0]
        self._check = SampleCheck(self._encoder, SentencePieceEncoder(processor), options.check_ids)
        self._eos, self._vocab_size, self._dtype = processor.eos_id(), processor.vocab_size(), id_dtype(processor.vocab_size())
        self._reader = SegmentReader(options.read, self._local)
        self._filter = options.keep.compiled()

    def _local(self, item: Input) -> str:
        return str(local_copy(item, self._work.spool)) if item.remote else item.path

    def __call__(self, segment: Segment, report: Callable[[Counts], None]) -> dict[str, Any]:
        """Write a segment's shards and record, and publish them; returns the record.

        ``report`` is called after every batch. Raises ValueError for bad input, OSError for a disk that is full.
        """
        folder = self._work.begin(segment)
        writers: dict[str, ShardWriter] = {}
        hashes: dict[str, list[np.ndarray]] = {}
        skipped: dict[str, int] = {}
        checked = 0
        try:
            for split in SPLITS:
                (folder / split).mkdir()
                writers[split] = ShardWriter(folder / split, self._vocab_size, self._options.shard_size, keys=segment.key)
            for batch in self._reader.read(segment):
                counts = Counts(batch.raw_bytes)
                self._filter_batch(batch)
                if batch.texts:
                    checked += self._check(batch.texts, batch.origin)
                    self._encode(batch, writers, hashes, counts)
                for reason, number in batch.skipped.items():
                    skipped[reason] = skipped.get(reason, 0) + number
                report(counts)
            record = {"end": self._reader.at_end, "skipped": skipped, "checked": checked, "splits": {}}
            for split, writer in writers.items():
                entries = writer.close()
                if not entries:
                    (folder / split).rmdir()
                    continue
                record["splits"][split] = {"shards": entries, "text_bytes": writer.text_bytes}
                if self._options.deduplicate:
                    write_synced(folder / split / FINGERPRINTS, np.concatenate(hashes[split]).tobytes())
            return self._work.publish(segment, folder, record)
        finally:
            for writer in writers.values():
                writer.abort()
            shutil.rmtree(folder, ignore_errors=True)

    def _filter_batch(self, batch: Batch) -> None:
        reasons = [self._filter(text) for text in batch.texts]
        for reason in filter(None, reasons):
            batch.skip(reason)
        batch.places = [place for place, reason in zip(batch.places, reasons, strict=True) if reason is None]
        batch.texts = [text for text, reason in zip(batch.texts, reasons, strict=True) if reason is None]

    def _encode(self, batch: Batch, writers: dict[str, ShardWriter], hashes: dict[str, list[np.ndarray]], counts: Counts) -> None:
        """Encode, append EOS, and split by the hash of each document's text (equal documents stay together)."""
        plain, lengths = self._encoder.encode(batch.texts)
        lengths = lengths + 1
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]), self._dtype)
        of_text = np.ones(len(ids), bool)
        of_text[ends - 1] = False
        ids[of_text] = plain
        ids[ends - 1] = self._eos
        keep = self._fitting(lengths, batch)
        fraction = self._options.validation_fraction
        validation = np.array([_in_validation(text, fraction) for text in batch.texts]) if fraction else np.zeros(len(lengths), bool)
        sizes = np.fromiter(map(len, batch.texts), np.int64, len(batch.texts))
        for split, chosen in (("train", keep & ~validation), ("validation", keep & validation)):
            if not chosen.any():
                continue
            text_bytes = int(sizes[chosen].sum())
            everything = bool(chosen.all())
            writers[split].add(
                ids if everything else ids[np.repeat(chosen, lengths)], lengths if everything else lengths[chosen], text_bytes=text_bytes
            )
            counts.text_bytes, counts.documents = counts.text_bytes + text_bytes, counts.documents + int(chosen.sum())
            if self._options.deduplicate:
                texts = [text for text, wanted in zip(batch.texts, chosen, strict=True) if wanted]
                hashes.setdefault(split, []).append(document_fingerprints(texts))

    def _fitting(self, lengths: np.ndarray, batch: Batch) -> np.ndarray:
        limit = self._options.max_document_tokens
        keep = np.ones(len(lengths), bool) if limit is None else lengths <= limit
        if keep.all():
            return keep
        if self._options.read.long_documents == "error":
            first = int(np.flatnonzero(~keep)[0])
            raise ValueError(
                f"{batch.origin(first)}: {lengths[first]} tokens, more than the {limit} of --max-document-tokens "
                "(by default what one shard holds): raise it to keep the document whole in a larger shard, or use --long-documents skip"
            )
        batch.skipped["too_long"] = batch.skipped.get("too_long", 0) + int((~keep).sum())
        return keep


def _in_validation(text: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") < fraction * 2.0**64
