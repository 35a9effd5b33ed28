"""Text to ids: sentencepiece, and a faster library that must give sentencepiece's ids.

gigatoken (optional: ``pip install 'swax_megatron[fast]'``) encodes SentencePiece BPE models several times faster. It reads
special tokens such as ``</s>`` or ``<0x0A>`` out of a document's text, where they are plain text to sentencepiece; the words
that hold one go to sentencepiece. It is used only for models whose ids it can give exactly, is compared with sentencepiece on
difficult strings before it starts and on a sample of the corpus while it runs, and a difference stops the run.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep.cutting import Cutter
from swax_megatron.data.writer import id_dtype
from swax_megatron.hf.tokenizer import HARD_STRINGS, inexact, read_proto

ENCODERS = ("auto", "gigatoken", "sentencepiece")
CHECKED_BYTES = 32 << 10  # of a sampled document


class Encoder(Protocol):
    """UTF-8 text to ids without any added token; literal special-token text in a document is plain text."""

    name: str

    def encode(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after another, and how many each has (int64)."""
        ...


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

    name = "sentencepiece"

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor, self._dtype = processor, id_dtype(processor.vocab_size())

    def encode(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Encoder``."""
        encoded = self._processor.encode(texts, out_type=int, num_threads=1)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = [np.array(document, self._dtype) for document in encoded]
        return np.concatenate([np.empty(0, self._dtype), *ids]), lengths


class GigatokenEncoder:
    """gigatoken on a SentencePiece BPE model; words with literal special-token text go through sentencepiece."""

    name = "gigatoken"

    def __init__(self, path: str | Path, reference: SentencePieceEncoder) -> None:
        """path: of a model that ``inexact`` finds nothing against."""
        import gigatoken

        proto = read_proto(path)
        self._tokenizer, self._reference = gigatoken.Tokenizer.from_json(gigatoken_json(proto)), reference
        self._cutter = Cutter(proto)

    def encode(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See ``Encoder``."""
        odd = {number for number, text in enumerate(texts) if self._cutter.special.search(text)}
        if not odd:
            return self._encode_plain(texts)
        cut = [self._cutter.cut(text) if number in odd else [(text, False)] for number, text in enumerate(texts)]
        parts = [part for document in cut for part in document]
        encoded = {
            special: iter(_documents(*encode([text for text, other in parts if other == special])))
            for special, encode in ((False, self._encode_plain), (True, self._reference.encode))
            if any(other == special for _, other in parts)
        }
        ids = [next(encoded[special]) for _, special in parts]
        sizes = iter(map(len, ids))
        lengths = [sum(itertools.islice(sizes, len(document))) for document in cut]
        return np.concatenate(ids), np.array(lengths, np.int64)

    def _encode_plain(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def gigatoken_json(proto: sentencepiece_model_pb2.ModelProto) -> str:
    """What ``gigatoken.Tokenizer.from_sentencepiece`` makes of a model that ``inexact`` finds nothing against, in a third of the time.

    As the scores of such a model are all different, its merges are the splits of its pieces by score, the longer left part first.
    """
    control, normal = (proto.SentencePiece.Type.Value(name) for name in ("CONTROL", "NORMAL"))
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = [(piece.score, piece.piece) for piece in proto.pieces if piece.type == normal and len(piece.piece) > 1]
    merges = []
    for _, piece in sorted(scores, reverse=True):
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append((piece[:cut], piece[cut:]))
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prefix = [{"type": "Prepend", "prepend": "\u2581"}] if proto.normalizer_spec.add_dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    model = {"type": "BPE", "unk_token": proto.trainer_spec.unk_piece, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[piece.piece], "content": piece.piece, **added} for piece in proto.pieces if piece.type == control],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {**model, "vocab": vocab, "merges": merges},
    }
    return json.dumps(tokenizer, ensure_ascii=False)


def _documents(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def make_encoder(path: str | Path, wanted: str = "auto", compare: bool = True) -> tuple[Encoder, str]:
    """The encoder for a model and a sentence that says which one it is and why.

    wanted: one of ``ENCODERS``.  compare: with sentencepiece on difficult strings; without, another process has done it.
    ValueError where gigatoken is asked for and cannot be used.
    """
    processor = load_tokenizer(path)
    reference = SentencePieceEncoder(processor)
    if wanted == "sentencepiece":
        return reference, "encoder: sentencepiece"
    reason = _unfit(path)
    if reason is None:
        try:
            fast = GigatokenEncoder(path, reference)
            hard = [text.encode() for text in [*HARD_STRINGS, *_some_pieces(processor)]]
            reason = _difference(fast, reference, hard) if compare else None
        except (ValueError, RuntimeError) as error:
            reason = f"gigatoken cannot load it ({error})"
        if reason is None:
            return fast, f"encoder: gigatoken {_version()}, compared with sentencepiece on a sample"
    if wanted == "gigatoken":
        raise ValueError(f"--encoder gigatoken: {reason}; use --encoder sentencepiece")
    return reference, f"encoder: sentencepiece ({reason})"


def _unfit(path: str | Path) -> str | None:
    """Why gigatoken is not used for a model, or None."""
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return "gigatoken, which is several times faster, is not installed: pip install 'swax_megatron[fast]'"
    problem = inexact(read_proto(path))
    return problem and f"gigatoken is not known to give its ids, because {problem.partition(';')[0]}"


def _version() -> str:
    from importlib.metadata import version

    return version("gigatoken")


def _some_pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(0, processor.vocab_size(), 7)]
    return [piece * 3 for piece in pieces]


def _difference(encoder: Encoder, reference: Encoder, texts: list[bytes]) -> str | None:
    """A sentence about the first text that gives other ids, or None."""
    for text, got, want in zip(texts, _documents(*encoder.encode(texts)), _documents(*reference.encode(texts)), strict=True):
        if not np.array_equal(got, want):
            other = np.flatnonzero(got[: len(want)] != want[: len(got)])
            at = int(other[0]) if len(other) else min(len(got), len(want))
            ids = f"{got[at : at + 4].tolist()} from id {at} on, not {want[at : at + 4].tolist()}"
            return f"{encoder.name} gives other ids than sentencepiece for {text[:60]!r}: {ids}"
    return None


class SampleCheck:
    """Compares an encoder with sentencepiece on a share of the documents: the same ones in every run.

    share: of the documents, chosen by a hash of their text; of a long one the first ``CHECKED_BYTES`` are compared, and the
    whole of every document where the share is 1.
    """

    def __init__(self, encoder: Encoder, reference: Encoder, share: float) -> None:
        self._encoder, self._reference = encoder, reference
        self._share = 0.0 if encoder.name == reference.name else share

    def __call__(self, texts: list[bytes], origin: Any) -> int:
        """Check a batch; returns how many documents were compared. ValueError at a difference, which names the document."""
        if not self._share:
            return 0
        chosen = [number for number, text in enumerate(texts) if self._share >= 1 or _sampled(text, self._share)]
        if not chosen:
            return 0
        pieces = [texts[number] if self._share >= 1 else _piece(texts[number]) for number in chosen]
        if _difference(self._encoder, self._reference, pieces):
            for number, piece in zip(chosen, pieces, strict=True):
                if problem := _difference(self._encoder, self._reference, [piece]):
                    raise ValueError(f"{origin(number)}: {problem}; use --encoder sentencepiece, and please report this text")
        return len(chosen)


def _sampled(text: bytes, share: float) -> bool:
    return zlib.crc32(text) < share * 2.0**32


def _piece(text: bytes) -> bytes:
    """The beginning of a document, not cut inside a character."""
    return text if len(text) <= CHECKED_BYTES else text[:CHECKED_BYTES].decode("utf-8", "ignore").encode()
