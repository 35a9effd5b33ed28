"""From text to shards through the command lines: what is written, by whom it can be read, that it never depends on workers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import webdataset
import zstandard

from data_prep import show, tokenizer, verify
from data_prep.inputs import Source
from data_prep.readers import ReadOptions
from data_prep.segments import plan
from swax_megatron.data.shards import ShardedDataset
from tests.texts import EOS, ODD_TEXTS, run_shard, small_tokenizer, texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(model))


def decoded(folder: Path) -> list[str]:
    """Every document of a data set in stored order, without its EOS."""
    dataset = ShardedDataset(folder)
    processor = sentencepiece.SentencePieceProcessor(str(dataset.tokenizer_path))
    places = [(s, j) for s in range(len(dataset.shards)) for j in range(int(dataset.shard_documents[s]))]
    documents = [dataset.document(*place).tolist() for place in places]
    assert all(ids[-1] == EOS for ids in documents)
    return [processor.decode(ids[:-1]) for ids in documents]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".tmp-" in path.name or ".old-" in path.name)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_gives_back_odd_text(processor, text):
    assert processor.decode(processor.encode(text)) == text


def test_tokenizer_settings(processor):
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == 400
    assert EOS not in processor.encode("</s>") and 1 not in processor.encode("<s>")
    assert [processor.id_to_piece(i) for i in processor.encode("2024")] == list("2024")
    pieces = [processor.id_to_piece(i) for i in range(400) if not processor.is_control(i) and not processor.is_byte(i)]
    assert not any("▁" in piece.lstrip("▁") for piece in pieces)  # the Hugging Face export relies on it


def test_tokenizer_is_reproducible_and_samples_the_whole_corpus(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", texts(400))
    options = ["--input", str(source), "--vocab-size", "330", "--sample-bytes", "20K"]
    for name in ("one.model", "two.model"):
        assert tokenizer.main([*options, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    assert "bytes a token" in capsys.readouterr().out
    pieces = [piece for _, piece in tokenizer.sample([Source("a", (str(source),))], ReadOptions(), 20 << 10, tmp_path)]
    size = sum(len(piece.encode()) for piece in pieces)
    assert 18 << 10 < size <= 20 << 10
    taken = {int("".join(filter(str.isdigit, piece.split()[1 if piece.startswith("def") else 0]))) for piece in pieces}
    assert min(taken) < 40 and max(taken) > 360


def test_sentences_join_to_the_text():
    for text in (*ODD_TEXTS, "line\n" * 5000, "é" * 9000, " " * 9000, ("w" * 5000 + " ") * 3):
        pieces = list(tokenizer.sentences(text))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= tokenizer.SENTENCE_BYTES for piece in pieces)


def test_every_kind_of_file_gives_the_same_documents(tmp_path, model):
    documents = [*texts(60, seed=1), *ODD_TEXTS]
    plain = write_jsonl(tmp_path / "p.jsonl", documents)
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    frames = [zstandard.ZstdCompressor().compress(part) for part in (plain.read_bytes()[:1000], plain.read_bytes()[1000:])]
    (tmp_path / "z.jsonl.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), "text": documents}), tmp_path / "q.parquet", row_group_size=7)
    (tmp_path / "files").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "files" / f"{number:04d}.txt").write_bytes(text.encode())
    for name in ("p.jsonl", "g.jsonl.gz", "z.jsonl.zst", "q.parquet", "files"):
        out = tmp_path / f"out-{name}"
        assert run_shard(tmp_path / name, model, out) == 0
        assert decoded(out) == documents, name
        assert ShardedDataset(out).text_bytes == sum(len(text.encode()) for text in documents)


def test_folders_are_walked_in_order_and_filtered(tmp_path, model):
    for name in ("b/2.py", "b/1.rst", "a/z.py", "c.py", "a/skipped.bin"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(f"content of {name}")
    assert run_shard(tmp_path / "src", model, tmp_path / "out", "--glob", "*.py", "*.rst") == 0
    assert decoded(tmp_path / "out") == [f"content of {name}" for name in ("c.py", "a/z.py", "b/1.rst", "b/2.py")]


def test_workers_do_not_change_a_byte(tmp_path, model):
    source = write_jsonl(tmp_path / "a.jsonl", texts(6000, seed=2))
    (task,) = plan([Source("a", (str(source),))], 300 << 10, 200 << 10)
    assert task.segments > 8
    options = ("--shard-size", "300K", "--segment-bytes", "200K", "--validation-fraction", "0.1")
    for workers in ("1", "2", "4"):
        assert run_shard(source, model, tmp_path / workers, *options, "--workers", workers) == 0
        assert digests(tmp_path / workers) == digests(tmp_path / "1")
    os.rename(tmp_path / "1", tmp_path / "one")
    assert len(ShardedDataset(tmp_path / "one" / "train").shards) > 2
    train, validation = decoded(tmp_path / "one" / "train"), decoded(tmp_path / "one" / "validation")
    assert sorted(train + validation) == sorted(texts(6000, seed=2))
    assert 0.08 < len(validation) / 6000 < 0.12
    again = tmp_path / "again.jsonl"  # where a document goes depends on its text alone
    write_jsonl(again, [*texts(50, seed=3), *reversed(texts(6000, seed=2))])
    assert run_shard(again, model, tmp_path / "three", *options) == 0
    assert set(validation) <= set(decoded(tmp_path / "three" / "validation"))
    assert leftovers(tmp_path) == []


def test_shards_are_plain_tars_and_webdataset_reads_them(tmp_path, model):
    documents = [*texts(400, seed=4), *ODD_TEXTS]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    assert run_shard(source, model, tmp_path / "out", "--shard-size", "16K") == 0
    dataset = ShardedDataset(tmp_path / "out", verify="sha256")
    assert len(dataset.shards) > 2
    assert all(entry["bytes"] < 20 << 10 for entry in dataset.shards)
    processor = sentencepiece.SentencePieceProcessor(str(model))

    def split(ids: bytes, lengths: bytes) -> list[str]:
        parts = np.split(np.frombuffer(ids, "<u2"), np.cumsum(np.frombuffer(lengths, "<u4"))[:-1])
        assert all(part[-1] == EOS for part in parts)
        return [processor.decode(part[:-1].tolist()) for part in parts]

    tars = [str(tar) for tar, _ in dataset.files]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert [text for sample in samples for text in split(sample["ids"], sample["lengths"])] == documents

    by_tarfile: list[str] = []
    for path in tars:
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
            assert all(member.offset_data % 512 == 0 for member in tar.getmembers())
        for name in sorted(name for name in content if name.endswith(".ids")):
            by_tarfile += split(content[name], content[name.replace(".ids", ".lengths")])
    assert by_tarfile == documents
    listed = subprocess.run(["tar", "tf", tars[0]], capture_output=True, text=True, check=True).stdout.split()
    assert listed[:2] == ["000000-00000-000000-000000.ids", "000000-00000-000000-000000.lengths"]


def test_manifest_says_what_was_done(tmp_path, model):
    source = write_jsonl(tmp_path / "a.jsonl", [*texts(20), "", "   "])
    assert run_shard(source, model, tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and manifest["dtype"] == "uint16"
    assert manifest["tokenizer"] == {
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": 400,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
    }
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert {reason: count for reason, count in manifest["skipped"].items() if count} == {"empty": 1}
    assert manifest["totals"]["documents"] == 21 and manifest["options"]["text_key"] == "text"
    given = {name: manifest["totals"][name] for name in ("documents", "tokens", "text_bytes")}
    assert manifest["sources"] == [{"name": str(source), "path": str(source), "files": 1, "bytes": source.stat().st_size, **given}]


def test_long_documents_are_neither_lost_nor_cut(tmp_path, model):
    documents = [*texts(5), "long " * 40_000, *texts(5, seed=9)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    assert run_shard(source, model, tmp_path / "out", "--shard-size", "8K", "--max-document-tokens", "1000000") == 0
    assert decoded(tmp_path / "out") == documents
    assert run_shard(source, model, tmp_path / "short", "--max-document-tokens", "5000", "--long-documents", "skip") == 0
    assert decoded(tmp_path / "short") == [*texts(5), *texts(5, seed=9)]
    assert ShardedDataset(tmp_path / "short").manifest["skipped"]["too_long"] == 1


def test_verify_and_show(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", texts(300))
    out = tmp_path / "out"
    assert run_shard(source, model, out, "--shard-size", "16K", "--validation-fraction", "0.2") == 0
    assert verify.main([str(out)]) == 0
    assert show.main([str(out), "--entropy", "--png", str(tmp_path / "lengths.png")]) == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{out / 'train'}: whole" in printed and "tokens a byte" in printed and "nats a token" in printed and "--- shard" in printed
    tar = sorted((out / "train").glob("*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[700] ^= 1  # one bit of one id
    tar.write_bytes(data)
    assert verify.main([str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"{tar}: the sha256 is not the manifest's" in printed and f"{out / 'validation'}: whole" in printed


def test_scripts_run_as_files(tmp_path, model):
    """As users call them: `python data_prep/x.py` puts data_prep/ first on the path."""
    source = write_jsonl(tmp_path / "a.jsonl", texts(30))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(script: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "data_prep" / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    done = call("shard.py", "--input", source, "--tokenizer", model, "--out", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0 and "30 documents" in done.stdout and "MB/s" in done.stderr, done.stderr
    refused = call("shard.py", "--input", source, "--tokenizer", model, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert refused.stderr == f"error: {tmp_path / 'out'} exists already; choose another --out or add --overwrite\n"
    assert call("verify.py", tmp_path / "out").stdout == f"{tmp_path / 'out'}: whole\n"
    assert "example" in call("tokenizer.py", "--help").stdout


def test_the_first_error_in_order_is_reported_whatever_the_workers(tmp_path, model, capfd):
    lines = write_jsonl(tmp_path / "a.jsonl", texts(6000, seed=2)).read_bytes().split(b"\n")
    lines[2000] = lines[5500] = b"{broken"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    for workers in ("1", "2"):
        assert run_shard(tmp_path / "a.jsonl", model, tmp_path / "out", "--segment-bytes", "100K", "--workers", workers) == 2
        assert "a.jsonl line 2001: not valid JSON" in capfd.readouterr().err
