"""The converted tokenizer gives SentencePiece's ids on every kind of text, or the conversion is refused."""

import argparse
import inspect
import io
import json
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from swax_megatron.hf.tokenizer import HARD_STRINGS, check_same_ids, convert, export_tokenizer, read_model
from tests.texts import ODD_TEXTS, texts

OPTIONS = dict(
    model_type="bpe",
    vocab_size=600,
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
    minloglevel=2,
)


def stdlib_text() -> str:
    """Real code and prose that every machine has."""
    return inspect.getsource(argparse)


def train(folder: Path, **changes) -> Path:
    model = io.BytesIO()
    lines = [*stdlib_text().splitlines(keepends=True), *texts(60), *(t for t in ODD_TEXTS if "\x00" not in t)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**OPTIONS, **changes})
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module", params=[{}, {"add_dummy_prefix": True}, {"split_by_whitespace": False}], ids=["ours", "prefix", "crossing"])
def pair(request, tmp_path_factory):
    """SentencePiece and the tokenizer that transformers loads from the export."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = train(folder, **request.param)
    ids = export_tokenizer(path, folder)
    assert ids == {"unk": 0, "bos": 1, "eos": 2, "vocab_size": 600}
    return sentencepiece.SentencePieceProcessor(str(path)), AutoTokenizer.from_pretrained(folder)


def hundreds_of_texts() -> list[str]:
    """Lines and pieces of code, prose, odd Unicode, and random mixtures of spaces, repeats and special-token text."""
    source = random.Random(0)
    code = stdlib_text()
    found = [*HARD_STRINGS, *ODD_TEXTS, *texts(100, seed=7), *code.splitlines()[:300]]
    found += [code[start : start + 400] for start in range(0, 20_000, 400)]
    alphabet = [" ", "  ", "\n", "\t", "a", "b", "in", "the", "==", "-", "0", "12", "é", "中", "🙂", "\u2581"]
    alphabet += ["<s>", "</s>", "<unk>", "<0x0A>"]
    found += ["".join(source.choices(alphabet, k=source.randint(1, 40))) for _ in range(400)]
    for _ in range(100):
        found.append("".join(chr(source.choice([source.randint(1, 0x2FF), source.randint(0xE000, 0x1FAFF)])) for _ in range(30)))
    return found


def test_ids_and_texts_are_the_same(pair):
    processor, tokenizer = pair
    for text in hundreds_of_texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == processor.decode(ids)
        if "\u2581" not in text:
            assert tokenizer.decode(ids) == text


def test_special_tokens(pair):
    processor, tokenizer = pair
    assert len(tokenizer) == tokenizer.vocab_size == processor.get_piece_size()
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2, 2)
    assert tokenizer("")["input_ids"] == []  # nothing is added, as in training
    ids = tokenizer("a</s>b")["input_ids"]
    assert not {0, 1, 2} & set(ids) and ids == processor.encode("a</s>b")
    assert 2 in tokenizer("a</s>b", split_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*tokenizer("end")["input_ids"], 2], skip_special_tokens=True) == "end"
    batch = tokenizer(["one", "one two three"], padding=True, padding_side="left")
    assert batch["input_ids"][0][0] == 2 and batch["attention_mask"][0][0] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "unigram"}, "type is unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"byte_fallback": False, "vocab_size": 400}, "no bytes"),
        ({"user_defined_symbols": ["<tool>"]}, "user-defined"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=false"),
        ({"bos_id": -1, "eos_id": 1}, "no bos token"),
    ],
)
def test_models_without_an_exact_counterpart_are_refused(tmp_path, changes, message):
    path = train(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        export_tokenizer(path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_model(tmp_path / "absent.model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "text.model").write_bytes(b"no tokenizer at all, only text")
    for name in ("empty.model", "text.model"):
        with pytest.raises(ValueError, match="is no SentencePiece model"):
            read_model(tmp_path / name)


def test_the_check_sees_a_difference(tmp_path):
    """Two pieces with swapped scores, converted from the one and compared with the other; and tied scores."""
    path = train(tmp_path)
    proto = read_model(path)
    other = sentencepiece_model_pb2.ModelProto()
    other.CopyFrom(proto)
    longer = [piece for piece in other.pieces if piece.type == 1 and len(piece.piece) > 1]
    longer[0].score, longer[-1].score = longer[-1].score, longer[0].score
    processor = sentencepiece.SentencePieceProcessor(str(path))
    check_same_ids(processor, convert(proto), hundreds_of_texts())
    with pytest.raises(ValueError, match="cannot be converted exactly"):
        check_same_ids(processor, convert(other), hundreds_of_texts())
    longer[1].score = longer[2].score
    path.write_bytes(other.SerializeToString())
    with pytest.raises(ValueError, match="same score"):
        read_model(path)


def test_files_hold_no_hidden_defaults(tmp_path):
    export_tokenizer(train(tmp_path), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["split_special_tokens"] and config["pad_token"] == config["eos_token"] == "</s>"


def ten_thousand_lines() -> list[str]:
    """Lines of the standard library's source, of odd Unicode and of random whitespace; real code and prose in its docstrings."""
    lines: list[str] = []
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")) + sorted((folder / "encodings").glob("*.py")):
        lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 40_000:
            break
    source = random.Random(1)
    found = source.sample(lines, 7000)
    ranges = [(32, 0x24F), (0x370, 0x1FFF), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF)]
    found += ["".join(chr(source.randint(*source.choice(ranges))) for _ in range(20)) for _ in range(2000)]
    found += ["".join(source.choices(" \t\n\r\u00a0\u3000ab(=", weights=[8, 3, 2, 1, 1, 1, 2, 2, 1, 1], k=30)) for _ in range(1000)]
    return [*found, *(json.dumps(line) for line in found[:300])]


def test_ten_thousand_lines_give_the_same_ids(pair):
    processor, tokenizer = pair
    lines = ten_thousand_lines()
    assert len(lines) > 10_000
    for line, got, want in zip(lines, tokenizer(lines)["input_ids"], processor.encode(lines), strict=True):
        assert got == want, line
