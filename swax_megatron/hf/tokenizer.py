"""SentencePiece BPE model -> files of a transformers fast tokenizer that gives the same ids.

Both algorithms merge the best adjacent pair until none is left. SentencePiece ranks a pair by the score of the piece it
forms, the tokenizers library by the pair's place in a list: every split of every piece, sorted by the piece's score, is
that list. Only pairs of different splits of one piece can then be ordered differently, so the result is compared with
SentencePiece on every piece, repeated and overlapping, before it is used (``check_same_ids``).

Text such as ``</s>`` is plain text to SentencePiece. ``split_special_tokens`` makes it plain text here as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"  # how SentencePiece writes a space
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

HARD_STRINGS = (
    " ",
    "   leading and trailing   ",
    "a  b   c    d\t\te\n\n\nf\r\n  g",
    "<s>text</s> <unk> <0x41> </s></s><s>",
    "x</s>y <s > < s> [INST] <|im_start|>",
    f"a literal {SPACE} and {SPACE}{SPACE} twice",
    "0123456789 3.14159 1e-10 0xdeadBEEF 1,000,000",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # comment\n",
    "naïve café e\u0301 ﬁ ｆｕｌｌ Ω≈ç√∫ №½",
    "中文字符 日本語テキスト 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈🇨🇭 \U0001f9ff \U000e0041",
    "zero\u200bwidth\u00a0nbsp\u202fnarrow\u3000wide\ufeffbom",
    "control \x01\x02\x07\x1b[0m\x7f\x85 end",
    "nul \x00 inside",
    "\U00012000\ue000\ufffd\uffff",
    "aaaaaaaaaaaaaaaaaaaaaaa --------------------- ======= ......... \\\\\\\\\\",
    "abababababababab ananananana tototototo thethethethe",
)


def read_proto(path: str | Path) -> sentencepiece_model_pb2.ModelProto:
    """Parse a .model file. ValueError where it is none."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise ValueError(f"tokenizer {path} is no SentencePiece model: {error}") from error
    if not proto.pieces:
        raise ValueError(f"tokenizer {path} is no SentencePiece model: it holds no pieces")
    return proto


def read_model(path: str | Path) -> sentencepiece_model_pb2.ModelProto:
    """Parse a .model file. ValueError where it is none or has a setting that has no exact counterpart."""
    proto = read_proto(path)
    problem = inexact(proto)
    if problem:
        raise ValueError(f"tokenizer {path} cannot be converted exactly: {problem}")
    return proto


def inexact(proto: sentencepiece_model_pb2.ModelProto) -> str | None:
    """What keeps another implementation of BPE from giving this model's ids, as a clause, or None."""
    trainer, normalizer, kind = proto.trainer_spec, proto.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece
    if trainer.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        name = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(trainer.model_type).lower()
        return f"its type is {name}; train one with --model_type=bpe"
    if normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv:
        return f"it normalises text ({normalizer.name or 'custom rules'}); train one with --normalization_rule_name=identity"
    if normalizer.remove_extra_whitespaces:
        return "it removes spaces; train one with --remove_extra_whitespaces=false"
    if not normalizer.escape_whitespaces:
        return "it keeps spaces unescaped; train one with --escape_whitespaces=true"
    if trainer.treat_whitespace_as_suffix:
        return "it attaches spaces to the word before; train one with --treat_whitespace_as_suffix=false"
    if not trainer.byte_fallback:
        return "it has no bytes for unknown characters; train one with --byte_fallback=true"
    strange = [piece.piece for piece in proto.pieces if piece.type in (kind.USER_DEFINED, kind.UNUSED)]
    if strange:
        return f"it has user-defined or unused pieces ({', '.join(map(repr, strange[:3]))})"
    if sum(piece.type == kind.BYTE for piece in proto.pieces) != 256:
        return "it lacks some of the 256 byte pieces"
    if len({piece.piece for piece in proto.pieces}) != len(proto.pieces):
        return "two of its pieces are the same"
    scores = [piece.score for piece in proto.pieces if piece.type == kind.NORMAL and len(piece.piece) > 1]
    if len(set(scores)) != len(scores):
        return "two of its pieces have the same score, so that their order of merging is not defined"
    return None


def special_tokens(proto: sentencepiece_model_pb2.ModelProto) -> dict[str, int]:
    """{"unk": id, "bos": id, "eos": id}. ValueError where one is missing."""
    trainer = proto.trainer_spec
    ids = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id}
    for name, index in ids.items():
        if not 0 <= index < len(proto.pieces):
            raise ValueError(f"the tokenizer has no {name} token (id {index}); train one with --{name}_id set")
    return ids


def convert(proto: sentencepiece_model_pb2.ModelProto) -> Tokenizer:
    """The same tokenizer for the tokenizers library. Adds no BOS or EOS, as in training."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    plain = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    merges = []
    for piece, score in plain.items():
        for cut in range(len(piece) - 1, 0, -1):  # longer left part first: where equal pieces overlap, the left one usually wins
            if piece[:cut] in plain and piece[cut:] in plain:
                merges.append((-score, len(merges), piece[:cut], piece[cut:]))
    merges.sort()
    special = special_tokens(proto)
    unknown = proto.pieces[special["unk"]].piece
    pairs = [(left, right) for _, _, left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(([normalizers.Prepend(SPACE)] if prefix else []) + [normalizers.Replace(" ", SPACE)])
    if not any(SPACE in piece.lstrip(SPACE) for piece in plain):  # no piece crosses from a word into a space: words can be cached
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()] + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    tokenizer.add_special_tokens([AddedToken(proto.pieces[i].piece, special=True, normalized=False) for i in sorted(set(special.values()))])
    tokenizer.encode_special_tokens = True
    return tokenizer


def export_tokenizer(path: str | Path, folder: str | Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json into ``folder`` (it exists); returns the special tokens' ids and "vocab_size".

    Raises ValueError where the model cannot be converted exactly, or a check finds other ids than SentencePiece's.
    """
    proto = read_model(path)
    special = special_tokens(proto)
    tokenizer = convert(proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    check_same_ids(processor, tokenizer, [*HARD_STRINGS, *piece_strings(proto)])
    names = {name: proto.pieces[index].piece for name, index in special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": names["unk"],
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "pad_token": names["eos"],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder = Path(folder)
    tokenizer.save(str(folder / TOKENIZER_FILES[0]))
    (folder / TOKENIZER_FILES[1]).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {**special, "vocab_size": len(proto.pieces)}


def piece_strings(proto: sentencepiece_model_pb2.ModelProto) -> Iterator[str]:
    """Every plain piece three times and a half in a row, where equal pieces can overlap, and runs of single characters."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    for piece in proto.pieces:
        if piece.type == kind.NORMAL:
            text = piece.piece.replace(SPACE, " ")
            yield text * 3 + text[: (len(text) + 1) // 2]
            if len(text) == 1:
                yield from (text * count for count in (2, 5, 7, 12, 33))


def check_same_ids(
    processor: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, texts: Iterable[str], batch: int = 4096
) -> None:
    """Encode with both. ValueError that shows the first text with different ids."""
    texts = list(texts)
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        wanted = processor.encode(part)
        for text, want, got in zip(part, wanted, tokenizer.encode_batch(part, add_special_tokens=False), strict=True):
            if want != got.ids:
                raise ValueError(f"the tokenizer cannot be converted exactly: {text[:60]!r} gives {want[:12]}, converted {got.ids[:12]}")
