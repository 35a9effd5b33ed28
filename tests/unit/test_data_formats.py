"""What goes in and what is left out: WARC-derived text, URLs and pipes, sources with notes, filters, encoders."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.cutting import Cutter
from data_prep.duplicates import FINGERPRINT, document_fingerprints, find_duplicates
from data_prep.encoders import GigatokenEncoder, SampleCheck, SentencePieceEncoder, gigatoken_json, make_encoder
from data_prep.records import json_text, plain_json_text
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.hf.tokenizer import HARD_STRINGS, read_proto
from tests.texts import EOS, ODD_TEXTS, run_shard, small_tokenizer, texts, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def decoded(folder: Path) -> list[str]:
    dataset = ShardedDataset(folder)
    processor = sentencepiece.SentencePieceProcessor(str(dataset.tokenizer_path))
    places = [(s, j) for s in range(len(dataset.shards)) for j in range(int(dataset.shard_documents[s]))]
    documents = [dataset.document(*place).tolist() for place in places]
    assert all(ids[-1] == EOS for ids in documents)
    return [processor.decode(ids[:-1]) for ids in documents]


def wet(documents: list[str]) -> bytes:
    def record(kind: str, payload: bytes) -> bytes:
        return b"WARC/1.0\r\nWARC-Type: %s\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (kind.encode(), len(payload), payload)

    return record("warcinfo", b"Software-Info: ia-web-commons\r\n") + b"".join(record("conversion", text.encode()) for text in documents)


def test_every_kind_is_cut_into_segments_without_loss(tmp_path, model):
    """Small segments cut plain and compressed files at many places; nothing is lost and nothing comes twice."""
    documents = [*texts(150, seed=1), *ODD_TEXTS, "WARC/1.0\r\nWARC-Type: conversion\r\n\r\n is text"]
    lines = write_jsonl(tmp_path / "a.jsonl", documents).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.wet").write_bytes(wet(documents))
    (tmp_path / "d.wet.gz").write_bytes(b"".join(gzip.compress(part) for part in (wet(documents)[:999], wet(documents)[999:])))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "e.parquet", row_group_size=10)
    for name in ("a.jsonl", "b.jsonl.gz", "c.wet", "d.wet.gz", "e.parquet"):
        assert run_shard(tmp_path / name, model, tmp_path / f"{name}-out", "--segment-bytes", "8K", "--shard-size", "16K") == 0
        assert decoded(tmp_path / f"{name}-out") == documents, name
    options = ("--segment-bytes", "8K", "--shard-size", "16K", "--workers", "2")
    assert run_shard(tmp_path / "b.jsonl.gz", model, tmp_path / "two", *options) == 0
    for tar in (tmp_path / "two").glob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "b.jsonl.gz-out" / tar.name).read_bytes()


def test_urls_and_pipes(tmp_path, model, capsys):
    documents = texts(80, seed=2)
    folder = tmp_path / "remote"
    folder.mkdir()
    lines = write_jsonl(folder / "a.jsonl", documents).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.txt").write_text("one file")
    url = f"file://{folder}/"
    inputs = [url, f"file://{folder}/a.jsonl", f"pipe:cat {folder}/b.jsonl.gz"]
    assert run_shard(inputs, model, tmp_path / "out", "--segment-bytes", "8K") == 0
    assert decoded(tmp_path / "out") == [*documents, *documents, "one file", *documents, *documents]
    assert not (tmp_path / "out.work").exists()


def test_a_pipe_that_fails_is_an_error(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run_shard(["pipe:cat absent-file | head -1"], model, tmp_path / "out") == 2
    assert "could not be read in 4 tries: the command exits with status 1" in capsys.readouterr().err
    assert run_shard([f"file://{tmp_path}/absent.jsonl"], model, tmp_path / "out") == 2
    assert "absent.jsonl cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sources_with_notes(tmp_path, model):
    write_jsonl(tmp_path / "web.jsonl", texts(30))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("print(1)\n")
    (tmp_path / "body.jsonl").write_text(json.dumps({"body": "other key"}) + "\n")
    listed = [
        {"name": "web", "input": [str(tmp_path / "web.jsonl")], "license": "CC-BY-4.0", "snapshot": "2026-05"},
        {"name": "code", "input": str(tmp_path / "src"), "glob": ["*.py"], "license": "MIT"},
        {"name": "more", "input": str(tmp_path / "body.jsonl"), "text_key": "body"},
    ]
    (tmp_path / "sources.yaml").write_text(json.dumps(listed))
    from data_prep import shard

    options = ["--tokenizer", str(model), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert shard.main(["--sources", str(tmp_path / "sources.yaml"), *options]) == 0
    web, code, more = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert web["notes"] == {"license": "CC-BY-4.0", "snapshot": "2026-05"} and web["documents"] == 30
    assert (code["documents"], code["text_bytes"], code["notes"]) == (1, 9, {"license": "MIT"})
    assert more["documents"] == 1 and "notes" not in more
    assert decoded(tmp_path / "out") == [*texts(30), "print(1)\n", "other key"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("x: [", "cannot be read"),
        ("{name: a}", "must be a list of entries"),
        ("[{input: a}]", "an entry has no name"),
        ("[{name: a}]", "input of 'a' must be a list of strings"),
        ("[{name: a, input: x, format: pdf}]", "format of 'a' is 'pdf'"),
        ("[{name: a, input: x}, {name: a, input: y}]", "the name 'a' stands twice"),
    ],
)
def test_bad_sources(tmp_path, model, capsys, content, sentence):
    from data_prep import shard

    (tmp_path / "sources.yaml").write_text(content)
    assert shard.main(["--sources", str(tmp_path / "sources.yaml"), "--tokenizer", str(model), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def test_filters_are_counted(tmp_path, model):
    documents = ["", "ab", "lorem ipsum dolor", "good text one", "good text two\nDROP me", "x" * 200, "good three"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    options = ("--min-text-bytes", "3", "--max-text-bytes", "100", "--keep-regex", "good", "absent", "--drop-regex", "^DROP")
    assert run_shard(source, model, tmp_path / "out", *options) == 0
    assert decoded(tmp_path / "out") == ["good text one", "good three"]
    skipped = json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]
    assert {reason: count for reason, count in skipped.items() if count} == {"empty": 1, "too_short": 1, "too_long": 1, "filtered": 2}


def test_bad_records_can_be_skipped(tmp_path, model):
    lines = [json.dumps({"text": "fine"}), "{broken", '{"body": 1}', '{"text": 5}', json.dumps({"text": "y" * 3000}), '{"text": "also"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = ("--bad-records", "skip", "--long-documents", "skip", "--max-record-bytes", "2000")
    assert run_shard(tmp_path / "a.jsonl", model, tmp_path / "out", *options) == 0
    assert decoded(tmp_path / "out") == ["fine", "also"]
    skipped = json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]
    assert (skipped["malformed"], skipped["too_long"]) == (3, 1)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["text", "t", "\u00e9"]), st.text() | st.none() | st.lists(st.floats())), st.booleans())
def test_the_faster_json_reader_gives_the_same_text_or_none(record, ascii_only):
    line = json.dumps(record, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    found = plain_json_text(line, "text")
    if isinstance(record.get("text"), str):
        assert json_text(line.decode("utf-8", "surrogatepass"), "text") == record["text"]
        assert found is None or found.decode() == record["text"]
    else:
        assert found is None


ODD_LINES = (b"", b"[]", b"3", b'"text"', b'{"text": 1}', b'{"text": NaN}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": "a"')


@pytest.mark.parametrize("line", ODD_LINES)
def test_the_faster_json_reader_leaves_odd_lines_to_the_other(line):
    assert plain_json_text(line, "text") is None
    assert plain_json_text(b'{"text": "a", "text": "b"}', "text") == b"b"


def test_duplicates_in_many_partitions(tmp_path):
    """The first of equal documents stays, whatever the memory; 20,000 documents in 7 pieces against a set."""
    random = np.random.default_rng(0)
    documents = [b"%d" % number for number in random.integers(0, 8000, 20_000)]
    bounds = np.sort(random.integers(0, len(documents), 6))
    pieces = [documents[start:stop] for start, stop in zip([0, *bounds], [*bounds, len(documents)], strict=True)]
    paths = []
    for number, piece in enumerate(pieces):
        paths.append(tmp_path / f"piece-{number}")
        document_fingerprints(piece).astype(FINGERPRINT).tofile(paths[-1])
    for memory in (1 << 30, 20_000):
        find_duplicates(paths, tmp_path / "out", memory)
        seen: set[bytes] = set()
        for number, piece in enumerate(pieces):
            again = [place for place, text in enumerate(piece) if text in seen or piece.index(text) < place]
            seen.update(piece)
            path = tmp_path / "out" / str(number)
            assert again == (sorted(np.fromfile(path, "<i8").tolist()) if path.exists() else [])


def test_gigatoken_gives_sentencepiece_s_ids_on_every_text(model):
    pytest.importorskip("gigatoken")
    encoder, sentence = make_encoder(model)
    assert isinstance(encoder, GigatokenEncoder) and "gigatoken" in sentence
    reference = SentencePieceEncoder(sentencepiece.SentencePieceProcessor(str(model)))
    odd = [text.encode() for text in [*HARD_STRINGS, *ODD_TEXTS, *texts(300, seed=8), "", "a</s>b", "<unk><s>", "x" * 20_000]]
    for batch in (odd, odd[:1], [b"<s>"], [b""]):
        got, want = encoder.encode(batch), reference.encode(batch)
        assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


PIECES = [" ", "  ", "\u2581", "\n", "\t", "</s>", "<s>", "<unk>", "<0x0A>", "<0xFF>", "<s", "1>", "word", "other words", "é", "漢", "x y"]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_words_with_special_text_go_to_sentencepiece(model, documents):
    """The ids are the whole document's, wherever it is cut, and no word without special text takes the slow way."""
    pytest.importorskip("gigatoken")
    slow = []

    class Recording(SentencePieceEncoder):
        def encode(self, batch: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
            slow.extend(batch)
            return super().encode(batch)

    processor = sentencepiece.SentencePieceProcessor(str(model))
    encoder = GigatokenEncoder(model, Recording(processor))
    batch = [document.encode() for document in documents]
    got, want = encoder.encode(batch), SentencePieceEncoder(processor).encode(batch)
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
    special = Cutter(read_proto(model)).special
    assert all(special.search(text) for text in slow)
    for text in slow:
        words = [word for word in re.split(rb"(?<=[^ ])(?<!\xe2\x96\x81) (?=[^ ])", text) if b"\xe2\x96\x81" not in word]
        assert all(special.search(word) for word in words), slow


@pytest.mark.parametrize("prefix", [True, False])
def test_a_model_whose_pieces_reach_over_spaces_is_not_cut(model, prefix):
    proto = read_proto(model)
    proto.normalizer_spec.add_dummy_prefix = prefix
    cutter = Cutter(proto)
    space = b"" if prefix else b" "
    assert cutter.cut(b"a b <s> c d") == [(b"a b", False), (space + b"<s>", True), (space + b"c d", False)]
    assert cutter.cut(b"a <s>x</s>  y<0x41> ") == [(b"a", False), (space + b"<s>x</s>", True), (space + b" y<0x41> ", True)]
    proto.pieces.add(piece="of\u2581the", score=-1e9, type=proto.SentencePiece.NORMAL)
    assert Cutter(proto).cut(b"a b <s> c d") == [(b"a b <s> c d", True)]


@pytest.mark.parametrize("prefix", [False, True])
def test_gigatoken_s_own_conversion_is_the_same(model, prefix):
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    proto = read_proto(model)
    proto.normalizer_spec.add_dummy_prefix = prefix
    mine, theirs = json.loads(gigatoken_json(proto)), json.loads(sentencepiece_to_tokenizer_json(proto.SerializeToString()))
    for part in (mine, theirs):
        part["model"] = {key: value for key, value in part["model"].items() if value is not None}
    assert mine == {key: value for key, value in theirs.items() if value is not None or key in mine}


def test_a_difference_stops_the_run(model):
    processor = sentencepiece.SentencePieceProcessor(str(model))

    class Wrong(SentencePieceEncoder):
        name = "wrong"

        def encode(self, batch: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
            ids, lengths = super().encode(batch)
            for number, text in enumerate(batch):
                ids[lengths[: number + 1].sum() - 1] += text.startswith(b"37 ")
            return ids, lengths

    reference = SentencePieceEncoder(processor)
    batch = [text.encode() for text in texts(40)]
    with pytest.raises(ValueError, match="line 37: wrong gives other ids than sentencepiece"):
        SampleCheck(Wrong(processor), reference, 1.0)(batch, lambda number: f"line {number}")
    assert SampleCheck(Wrong(processor), reference, 0.0)(batch, str) == 0
    chosen = SampleCheck(GigatokenEncoder(model, reference), reference, 0.25)(batch, str)
    assert 2 < chosen < 25


def test_a_model_that_gigatoken_cannot_take_goes_to_sentencepiece(tmp_path, model, capsys):
    import io

    made = io.BytesIO()
    lines = iter(texts(300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=made, model_type="unigram", vocab_size=300, unk_id=0, bos_id=1, eos_id=2, minloglevel=2
    )
    (tmp_path / "u.model").write_bytes(made.getvalue())
    source = write_jsonl(tmp_path / "a.jsonl", texts(5))
    assert run_shard(source, tmp_path / "u.model", tmp_path / "out") == 0
    assert "encoder: sentencepiece (gigatoken is not known to give its ids, because its type is unigram)" in capsys.readouterr().err
    assert run_shard(source, tmp_path / "u.model", tmp_path / "two", "--encoder", "gigatoken") == 2
    assert "--encoder gigatoken: gigatoken is not known" in capsys.readouterr().err
