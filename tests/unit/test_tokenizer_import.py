"""Existing tokenizers become SentencePiece models with the same ids, or are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep import tokenizer
from data_prep.importing import import_tokenizer
from swax_megatron.hf.tokenizer import HARD_STRINGS, export_tokenizer
from tests.texts import ODD_TEXTS, small_tokenizer, texts, write_jsonl


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a SentencePiece model, a folder with its tokenizer.json)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model = small_tokenizer(folder)
    (folder / "hf").mkdir()
    export_tokenizer(model, folder / "hf")
    return model, folder / "hf"


def test_a_model_is_taken_as_it_is(exported, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", texts(20))
    out = tmp_path / "t.model"
    assert tokenizer.main(["--import", str(exported[0]), "--input", str(source), "--out", str(out)]) == 0
    assert out.read_bytes() == exported[0].read_bytes()
    assert f"{source}: " in capsys.readouterr().out
    (tmp_path / "bad.model").write_bytes(b"x")
    assert tokenizer.main(["--import", str(tmp_path / "bad.model"), "--out", str(tmp_path / "b")]) == 2
    assert "is not a SentencePiece model" in capsys.readouterr().err


def test_a_tokenizer_json_gives_the_same_ids(exported, tmp_path):
    model, folder = exported
    processor = sentencepiece.SentencePieceProcessor(model_proto=import_tokenizer(folder))
    original = sentencepiece.SentencePieceProcessor(str(model))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    for text in [*HARD_STRINGS, *ODD_TEXTS, *texts(200, seed=3)]:
        assert processor.encode(text) == original.encode(text)


def test_a_prefix_as_llama_s(exported, tmp_path):
    content = json.loads((exported[1] / "tokenizer.json").read_text())
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
    }
    content["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    processor = sentencepiece.SentencePieceProcessor(model_proto=import_tokenizer(tmp_path / "tokenizer.json"))
    assert processor.encode("the end") == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the end").ids
    assert processor.encode("the end") == sentencepiece.SentencePieceProcessor(str(exported[0])).encode(" the end")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda content: content["model"].update(byte_fallback=False), "it has no byte fallback"),
        (lambda content: content["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda content: content.update(normalizer={"type": "NFKC"}), "its normaliser or pre-tokeniser does more"),
        (lambda content: content["model"]["merges"].reverse(), "cannot be"),
        (lambda content: content["model"]["merges"].pop(), "no merge makes its piece"),
        (lambda content: content["added_tokens"][2].update(special=False), "is cut out of the text although it is not special"),
        (lambda content: content["model"].update(unk_token=None), "it has no unknown token"),
    ],
)
def test_what_cannot_be_exact_is_refused(exported, tmp_path, change, sentence, capsys):
    content = json.loads((exported[1] / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.main(["--import", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "t.model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --import ") and sentence in error
    assert not (tmp_path / "t.model").exists()


def test_byte_level_bpe_is_refused(tmp_path):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    made.train_from_iterator(texts(50), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="it has no byte fallback .byte-level BPE such as GPT-2's"):
        import_tokenizer(tmp_path)


def test_the_end_of_a_document_must_be_known(exported, tmp_path):
    content = (exported[1] / "tokenizer.json").read_text().replace('"</s>"', '"<stop>"')
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="name one of its special tokens with --eos-token"):
        import_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=import_tokenizer(tmp_path, "<stop>"))
    assert processor.eos_id() == 2
    shutil.rmtree(tmp_path)
