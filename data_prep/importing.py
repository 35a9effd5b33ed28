"""Existing tokenizers as SentencePiece models: a .model as it is, a Hugging Face tokenizer.json where the result is exact.

What can be imported from a tokenizer.json is what SentencePiece can express: a BPE model with byte fallback whose normaliser
only writes spaces as U+2581, with or without one before the text (Llama 2, Mistral, Gemma and their like, and our own
export). Byte-level BPE with a regular expression (GPT-2, Llama 3, Qwen), WordPiece and Unigram are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from data_prep.encoders import load_tokenizer
from swax_megatron.hf.tokenizer import HARD_STRINGS, SPACE, check_same_ids, inexact, piece_strings

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_USUAL_EOS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")
_USUAL_BOS = ("<s>", "<bos>", "<|startoftext|>", "<|begin_of_text|>")


def import_tokenizer(path: str | Path, eos_token: str | None = None, texts: Iterable[str] = ()) -> bytes:
    """The serialised SentencePiece model of a .model or a tokenizer.json (or a folder that holds one of them).

    eos_token: the token that ends a document, where the files do not tell.  texts: strings to compare as well.
    Raises ValueError where the result would not give the same ids.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise ValueError(f"--import {path} holds neither tokenizer.json nor tokenizer.model")
        path = found[0]
    if path.suffix != ".json":
        load_tokenizer(path)
        return path.read_bytes()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"--import {path} is no tokenizer.json that can be read: {error}") from error
    model = _convert(content, path, eos_token)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None  # documents are ids and EOS: what it would add is not wanted
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    try:
        check_same_ids(processor, tokenizer, [*HARD_STRINGS, *piece_strings(model), *texts])
    except ValueError as error:
        raise ValueError(f"--import {path}: {error}") from error
    return model.SerializeToString()


def _convert(content: dict[str, Any], path: Path, eos_token: str | None) -> sentencepiece_model_pb2.ModelProto:
    problem = _unlike_sentencepiece(content)
    if problem:
        raise ValueError(f"--import {path} cannot be expressed exactly as a SentencePiece model: {problem}")
    model = content["model"]
    names = sorted(model["vocab"], key=model["vocab"].get)
    special = {token["content"] for token in content.get("added_tokens", [])}
    proto = sentencepiece_model_pb2.ModelProto()
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    scores = _scores(model, path)
    for name in names:
        if name == model["unk_token"]:
            piece_kind, score = kind.UNKNOWN, 0.0
        elif name in special:
            piece_kind, score = kind.CONTROL, 0.0
        elif _BYTE.fullmatch(name):
            piece_kind, score = kind.BYTE, 0.0
        elif len(name) > 1 and name not in scores:
            raise ValueError(f"--import {path} cannot be expressed exactly as a SentencePiece model: no merge makes its piece {name!r}")
        else:
            piece_kind, score = kind.NORMAL, scores.get(name, -float(len(scores)))
        proto.pieces.add(piece=name, score=score, type=piece_kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = sentencepiece_model_pb2.TrainerSpec.BPE, len(names), True
    bos, eos = _ends(content, path, eos_token)
    trainer.unk_piece, trainer.unk_id = model["unk_token"], names.index(model["unk_token"])
    trainer.eos_piece, trainer.eos_id = eos, names.index(eos)
    trainer.bos_id, trainer.pad_id = names.index(bos) if bos else -1, -1
    trainer.bos_piece = bos or "<s>"
    normalizer.name, normalizer.add_dummy_prefix = "identity", _prefix(content)
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    problem = inexact(proto)
    if problem:
        raise ValueError(f"--import {path} cannot be expressed exactly as a SentencePiece model: {problem}")
    return proto


def _unlike_sentencepiece(content: dict[str, Any]) -> str | None:
    """What SentencePiece has no counterpart for, as a clause, or None."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return f"its model is {model.get('type')}, not BPE"
    if not model.get("byte_fallback"):
        return "it has no byte fallback (byte-level BPE such as GPT-2's, Llama 3's or Qwen's is of another kind)"
    if model.get("dropout") or model.get("ignore_merges") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "it uses dropout, ignore_merges, or marks inside or at the end of words"
    if model.get("unk_token") not in model["vocab"]:
        return "it has no unknown token"
    if sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
        return "its ids are not 0, 1, 2, ... without a gap"
    for token in content.get("added_tokens", []):
        if model["vocab"].get(token["content"]) != token["id"]:
            return f"its added token {token['content']!r} is not in the model's vocabulary"
        if not token.get("special"):
            return f"its added token {token['content']!r} is cut out of the text although it is not special"
    if _prefix(content) is None:
        return "its normaliser or pre-tokeniser does more than write spaces as U+2581"
    return None


def _prefix(content: dict[str, Any]) -> bool | None:
    """Whether a space is put before the text; None where the text is changed or cut in any other way."""
    steps = _steps(content.get("normalizer"), "normalizers")
    cuts = _steps(content.get("pre_tokenizer"), "pretokenizers")
    prefix = spaces = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            spaces = True
        else:
            return None
    for cut in cuts:
        if cut.get("type") == "Metaspace" and cut.get("replacement") == SPACE and cut.get("split") is False:
            prefix, spaces = cut.get("prepend_scheme") != "never", True
        elif cut.get("type") != "Split" or cut.get("pattern") != {"Regex": f"{SPACE}*[^{SPACE}]+|{SPACE}+"} or _crosses(content):
            return None  # that one cuts between words, where no piece lies across
    return prefix if spaces else None


def _crosses(content: dict[str, Any]) -> bool:
    return any(SPACE in name.lstrip(SPACE) for name in content["model"]["vocab"])


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[inner] if step.get("type") == "Sequence" else [step]


def _scores(model: dict[str, Any], path: Path) -> dict[str, float]:
    """A score for each piece that merges make: minus its place. ValueError where merges of one piece stand apart."""
    scores: dict[str, float] = {}
    last = None
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right != last and left + right in scores:
            raise ValueError(
                f"--import {path} cannot be expressed exactly as a SentencePiece model: the merges that make {left + right!r} "
                "stand at several places, where SentencePiece has one score a piece"
            )
        last = left + right
        scores.setdefault(last, -float(len(scores)))
    return scores


def _ends(content: dict[str, Any], path: Path, eos_token: str | None) -> tuple[str | None, str]:
    """The BOS token, if any, and the EOS token."""
    special = [token["content"] for token in content.get("added_tokens", [])]
    config = path.with_name("tokenizer_config.json")
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}

    def find(role: str, usual: tuple[str, ...]) -> str | None:
        value = said.get(f"{role}_token")
        value = value.get("content") if isinstance(value, dict) else value
        return value if value in special else next((name for name in usual if name in special), None)

    eos = eos_token or find("eos", _USUAL_EOS)
    if eos not in special:
        raise ValueError(f"--import {path} does not tell which token ends a document: name one of its special tokens with --eos-token")
    return find("bos", _USUAL_BOS), eos
