"""Every bad input gives one clear sentence, exit status 2, and nothing that a later step could take for whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep import show, tokenizer, verify
from swax_megatron.data.shards import ShardedDataset
from tests.texts import run_shard, small_tokenizer, texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
GOOD = b'{"text": "fine"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def noise(size: int) -> bytes:
    """Text that hardly compresses, so that cutting the archive cuts the content."""
    return b"".join(b'{"text": "%s"}\n' % os.urandom(64).hex().encode() for _ in range(size // 140))


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def parquet(values: list, kind: pyarrow.DataType, name: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, kind)}), sink)
    return sink.getvalue().to_pybytes()


BAD = {
    "no such file": ("missing.jsonl", None, "missing.jsonl does not exist"),
    "nothing in it": ("a.jsonl", b"\n\n", "the input holds no document"),
    "only empty documents": ("a.jsonl", b'{"text": ""}\n', "the input holds no document (skipped: 1 empty"),
    "malformed line": ("a.jsonl", GOOD * 3 + b'{"text": "cut\n' + GOOD, "a.jsonl line 4: not valid JSON"),
    "two records a line": ("a.jsonl", GOOD.strip() * 2 + b"\n", "a.jsonl line 1: not valid JSON"),
    "missing key": ("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', "a.jsonl line 2: no key 'text' (it has 'body', 'id')"),
    "not an object": ("a.jsonl", b'["text"]\n', "a.jsonl line 1: no key 'text' (it is a list)"),
    "not a string": ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1: 'text' is a int, not a string"),
    "invalid UTF-8 line": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl line 2: not valid UTF-8 at byte 10"),
    "lone surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1: not valid UTF-8"),
    "invalid UTF-8 file": ("a.txt", b"caf\xe9", "a.txt: not valid UTF-8 at byte 3; use --invalid-utf8 skip or replace"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(noise(1 << 18))[:-5000], "a.jsonl.gz is damaged or cut short"),
    "damaged gzip": ("a.jsonl.gz", flip(gzip.compress(noise(1 << 18)), 70_000), "a.jsonl.gz is damaged or cut short"),
    "no gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz is damaged or cut short"),
    "empty gzip": ("a.jsonl.gz", b"", "a.jsonl.gz is cut short"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(noise(1 << 18))[:-5000], "a.jsonl.zst is cut short"),
    "damaged zstd": ("a.jsonl.zst", flip(zstandard.compress(noise(1 << 18)), 5), "a.jsonl.zst is"),
    "no zstd": ("a.jsonl.zst", GOOD, "a.jsonl.zst is damaged"),
    "no Parquet": ("a.parquet", GOOD, "a.parquet is damaged or no Parquet file"),
    "cut Parquet": ("a.parquet", parquet(["x"], pyarrow.string())[:-20], "a.parquet is damaged or no Parquet file"),
    "missing column": ("a.parquet", parquet(["x"], pyarrow.string(), "body"), "a.parquet has no column 'text' (it has body)"),
    "column of numbers": ("a.parquet", parquet([1], pyarrow.int64()), "column 'text' of"),
    "null cell": ("a.parquet", parquet(["x", None], pyarrow.string()), "a.parquet row 2: 'text' is null"),
    "unknown archive": ("a.json.gz", gzip.compress(GOOD), "a.json.gz is of no known kind"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_corpus(case, tmp_path, model, capsys):
    name, content, sentence = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "sets" / "out"
    assert run_shard(tmp_path / name, model, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_bad_corpus_as_the_user_sees_it(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(b"{broken\n")
    for workers in (1, 2):
        command = [sys.executable, ROOT / "data_prep" / "shard.py", "--input", "a.jsonl", "--tokenizer", model, "--out", "out"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, "--workers", str(workers)], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 2
        encoder, error = done.stderr.splitlines()
        assert encoder.startswith("encoder: ") and error.startswith("error: a.jsonl line 1: not valid JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_invalid_utf8_can_be_skipped_or_replaced(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "x\xffy"}\n{"text": "p\\ud800q"}\n{"text": "\\ud83d\\ude42"}\n')
    assert run_shard(tmp_path / "a.jsonl", model, tmp_path / "skip", "--invalid-utf8", "skip") == 0
    skipped = ShardedDataset(tmp_path / "skip")
    assert skipped.documents == 2 and skipped.manifest["skipped"]["invalid_utf8"] == 2
    assert run_shard(tmp_path / "a.jsonl", model, tmp_path / "replace", "--invalid-utf8", "replace") == 0
    replaced = ShardedDataset(tmp_path / "replace")
    assert replaced.documents == 4
    assert replaced.text_bytes == len("fine" "x\ufffdy" "p\ufffd\ufffd\ufffdq" "🙂".encode())


def test_folder_without_a_match(tmp_path, model, capsys):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("x")
    assert run_shard(tmp_path / "src", model, tmp_path / "out") == 2
    assert "choose others with --glob" in capsys.readouterr().err


def test_a_document_that_is_too_long(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["ok", "long " * 100])
    assert run_shard(source, model, tmp_path / "out", "--max-document-tokens", "20") == 2
    assert "a.jsonl line 2: " in capsys.readouterr().err


def test_a_document_longer_than_a_shard(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["short", "long " * 20_000])
    assert run_shard(source, model, tmp_path / "out", "--shard-size", "4K") == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "more than the 2048 of --max-document-tokens (by default what one shard holds)" in sentence
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_bad_tokenizer(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert run_shard(source, tmp_path / "missing.model", tmp_path / "out") == 2
    assert "missing.model does not exist; train one" in capsys.readouterr().err
    (tmp_path / "bad.model").write_bytes(b"not a model")
    assert run_shard(source, tmp_path / "bad.model", tmp_path / "out") == 2
    assert "bad.model is not a SentencePiece model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_refused(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    assert run_shard(source, model, tmp_path / "out", "--validation-fraction", "0.000001") == 2
    assert "leaves the validation set empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_only_data_sets_and_only_when_whole(tmp_path, model, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", texts(5)), tmp_path / "out"
    assert run_shard(source, model, out) == 0
    before = (out / "manifest.json").read_bytes()
    assert run_shard(source, model, out) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_bytes(b"{broken\n")
    assert run_shard(tmp_path / "bad.jsonl", model, out, "--overwrite") == 2
    assert (out / "manifest.json").read_bytes() == before
    assert run_shard(write_jsonl(tmp_path / "b.jsonl", texts(9)), model, out, "--overwrite") == 0
    assert ShardedDataset(out).documents == 9
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("x")
    assert run_shard(source, model, tmp_path / "home", "--overwrite") == 2
    assert (tmp_path / "home" / "precious").exists()


@pytest.mark.parametrize("option", [("--workers", "0"), ("--shard-size", "x"), ("--validation-fraction", "1"), ("--shard-size", "0")])
def test_bad_options(option, tmp_path, model):
    with pytest.raises(SystemExit) as stopped:
        run_shard(tmp_path, model, tmp_path / "out", *option)
    assert stopped.value.code == 2


def test_tokenizer_refusals(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", texts(20)), tmp_path / "t.model"
    for size, sentence in (("100", "a vocabulary of 100 does not fit"), ("50000", "a vocabulary of 50000 does not fit")):
        assert tokenizer.main(["--input", str(source), "--out", str(out), "--vocab-size", size]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert tokenizer.main(["--input", str(tmp_path / "empty.txt"), "--out", str(out)]) == 2
    assert "the input holds no text" in capsys.readouterr().err
    out.write_bytes(b"mine")
    assert tokenizer.main(["--input", str(source), "--out", str(out), "--vocab-size", "400"]) == 2
    assert out.read_bytes() == b"mine" and not list(tmp_path.glob("*.tmp-*"))


def test_verify_and_show_need_a_data_set(tmp_path, model, capsys):
    assert verify.main([str(tmp_path)]) == 2 and show.main([str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err.count("error: no manifest.json in") == 2
    assert run_shard(write_jsonl(tmp_path / "a.jsonl", texts(5)), model, tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    assert verify.main([str(tmp_path / "out")]) == 1
    assert "format_version 2, newer than this program's 1" in capsys.readouterr().out


def peak_memory_mb(command: list[str]) -> tuple[int, str, float]:
    """Run a command of one process: its exit status, its errors and its peak resident memory."""
    script = (
        "import atexit, re, runpy, sys\n"
        "status = lambda: print('VmHWM', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n"
        "atexit.register(status)\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr, int(done.stderr.rsplit("VmHWM ", 1)[1]) / 1024


def test_a_line_of_100_mb(tmp_path, model):
    """Refused, or skipped and counted, without being held in memory; behind it the next line is found again."""
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD)
    small = write_jsonl(tmp_path / "small.jsonl", ["fine"])
    tool = [str(ROOT / "data_prep" / "shard.py"), "--tokenizer", str(model), "--workers", "1", "--max-record-bytes", "4M", "--input"]
    status, _, least = peak_memory_mb([*tool, str(small), "--out", str(tmp_path / "small")])
    assert status == 0
    status, errors, peak = peak_memory_mb([*tool, str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    assert status == 2 and "a.jsonl line 2: more than the 4194304 bytes of --max-record-bytes" in errors and peak < least + 40
    status, _, peak = peak_memory_mb([*tool, str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--long-documents", "skip"])
    assert status == 0 and peak < least + 40
    dataset = ShardedDataset(tmp_path / "out")
    assert dataset.documents == 2 and dataset.manifest["skipped"]["too_long"] == 1


def test_a_zstd_file_with_a_window_of_256_mb(tmp_path, model):
    """As ``zstd --long=28`` and above write; the library's own limit is 128 MiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(GOOD * 3) + compressor.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 1 << 28
    assert run_shard(tmp_path / "a.jsonl.zst", model, tmp_path / "out") == 0
    assert ShardedDataset(tmp_path / "out").documents == 3


FULL = {  # documents, words that each repeats, options, KiB that a file may have, the file that is the first to need more
    "a shard": (3000, "", "", 200, "shard-000000.tar"),
    "the fingerprints of a segment": (6000, "x", "--deduplicate", 100, "fingerprints.bin"),
    "the partitions of fingerprints": (6000, "x", "--deduplicate --segment-bytes 30K", 45, "repeats/train"),
    "a joined shard": (3000, "", "--segment-bytes 100K --workers 1", 200, "joined/"),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk(case, tmp_path, model):
    """One sentence, nothing that looks whole, and the same command finishes once there is room."""
    count, word, options, limit, file = FULL[case]
    documents = [word * (number % 7) + str(number // 2) for number in range(count)] if word else texts(count)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    command = f"{sys.executable} {ROOT}/data_prep/shard.py --input {source} --tokenizer {model} --out {tmp_path}/out --workers 2 {options}"
    limited = f"ulimit -f {limit}; exec {command}"  # writing more fails, as on a full disk
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: the disk is full or a limit is reached while ") and "make room and run the same command" in sentence
    assert file in sentence
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command.split(), capture_output=True, env=environment).returncode == 0
    assert verify.main([str(tmp_path / "out")]) == 0 and [path.name for path in tmp_path.iterdir()] == ["a.jsonl", "out"]


def test_verify_finds_every_kind_of_damage(tmp_path, model, capsys):
    out = tmp_path / "out"
    assert run_shard(write_jsonl(tmp_path / "a.jsonl", texts(300)), model, out, "--shard-size", "16K") == 0
    tars, indices = sorted(out.glob("*.tar")), sorted(out.glob("*.idx"))
    manifest = out / "manifest.json"

    def changed(path: Path, data: bytes) -> str:
        before = path.read_bytes()
        path.write_bytes(data)
        assert verify.main([str(out)]) == 1
        path.write_bytes(before)
        return capsys.readouterr().out

    middle = tars[1].read_bytes()
    for at in (0, 130, 700, len(middle) // 2, len(middle) - 1):  # name, header, ids, lengths, the zeros at the end
        assert f"{tars[1]}: the sha256 is not the manifest's" in changed(tars[1], flip(middle, at))
    for at in (3, 40, 200):
        assert str(indices[1]) in changed(indices[1], flip(indices[1].read_bytes(), at))
    assert "bytes where the manifest states" in changed(tars[2], tars[2].read_bytes()[:-1000])
    content = json.loads(manifest.read_text())
    for key in ("documents", "tokens", "shards"):
        wrong = {**content, "totals": {**content["totals"], key: content["totals"][key] + 1}}
        assert "totals are not the sums over the shards" in changed(manifest, json.dumps(wrong).encode())
    entry = {**content["shards"][0], "documents": content["shards"][0]["documents"] + 1}
    assert "does not belong to" in changed(manifest, json.dumps({**content, "shards": [entry, *content["shards"][1:]]}).encode())
    assert "is not the tokenizer that wrote" in changed(out / "tokenizer.model", flip((out / "tokenizer.model").read_bytes(), 9))
    away = [tars[0], tars[2], indices[3]]
    for number, path in enumerate(away):
        os.rename(path, tmp_path / f"away-{number}")
    found = changed(tars[1], flip(middle, 700))
    assert all(f"fault: shard file {path} is missing" in found for path in away)
    assert f"{tars[1]}: the sha256 is not the manifest's" in found and "totals" not in found  # the others are looked at all the same
    for number, path in enumerate(away):
        os.rename(tmp_path / f"away-{number}", path)
    assert verify.main([str(out)]) == 0


def rewritten(out: Path, number: int, tar: bytes, index: bytes) -> None:
    """Put other files in a shard's place, with the manifest that a faulty writer of theirs would have written."""
    manifest = json.loads((out / "manifest.json").read_text())
    entry = manifest["shards"][number]
    (out / entry["file"]).write_bytes(tar)
    (out / entry["index"]).write_bytes(index)
    entry |= {"sha256": hashlib.sha256(tar).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest(), "bytes": len(tar)}
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_verify_compares_the_content_where_every_sha256_is_right(tmp_path, model, capsys):
    out = tmp_path / "out"
    assert run_shard(write_jsonl(tmp_path / "a.jsonl", texts(300)), model, out, "--shard-size", "16K") == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    tar, index = (before[out / f"shard-000001.{ending}"] for ending in ("tar", "idx"))
    words = np.frombuffer(index, "<u8")
    members, documents = int(words[4]), int(words[2])
    first = int(words[8])  # where the first member's ids begin
    ids_of_first = int(words[8 + 4 * members + 1]) * 2
    lengths_at = tar.index(b"000000.lengths") // 512 * 512 + 512

    def faults_of(tar: bytes, index: bytes = index) -> str:
        rewritten(out, 1, tar, index)
        assert verify.main([str(out)]) == 1
        for path, content in before.items():
            path.write_bytes(content)
        found = capsys.readouterr().out
        assert "sha256" not in found and found.count("fault: ") == 1
        return found

    def put(data: bytes, at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    assert documents > 3 and members > 0
    assert "id 65535 is outside the vocabulary of 400" in faults_of(put(tar, first, b"\xff\xff"))
    assert "EOS does not stand at the end of every document" in faults_of(put(tar, first, b"\x02\x00"))
    assert "EOS does not stand at the end of every document" in faults_of(put(tar, first + ids_of_first - 2, b"\x05\x00"))
    assert "document lengths are not the index's" in faults_of(put(tar, lengths_at, b"\x01\x00\x00\x00"))
    moved = words.copy()
    moved[8] += 512
    assert re.search("members do not lie where the index says|contradicts itself", faults_of(tar, moved.tobytes()))
    moved = words.copy()
    moved[8 + 4 * members + 1] += 1
    assert "document lengths are not the index's" in faults_of(tar, moved.tobytes())
    header = put(tar, 0, b"\x00" * 512)
    assert re.search("members do not lie|empty header|truncated|end of file", faults_of(header))
    damaged = put(tar, 148, b"9999999\x00")
    assert "shard-000001.tar: " in faults_of(damaged)
    assert verify.main([str(out)]) == 0
