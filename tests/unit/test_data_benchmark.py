"""The benchmark of the data path runs from text to its last line; its limited link is limited."""

from __future__ import annotations

import json
import time

from benchmarks import data
from benchmarks.http_link import Link
from tests.texts import small_tokenizer, texts, write_jsonl


def test_every_part_gives_its_line(tmp_path, capsys):
    """Without peers, on a small corpus, in the parts that take little time."""
    model, corpus = small_tokenizer(tmp_path), write_jsonl(tmp_path / "a.jsonl", texts(300))
    results = tmp_path / "results.jsonl"
    command = ["--corpus", str(corpus), "--tokenizer", str(model), "--work", str(tmp_path / "work"), "--results", str(results)]
    command += ["--length", "256", "--repetitions", "1", "--workers", "1"]
    capsys.readouterr()
    assert data.main([*command, "--parts", "write", "ids", "remote"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["part"] for line in lines] == ["write", "write", "ids", "remote", "remote", "summary"]
    assert not [line for line in lines if line.get("failed")] and all("GiB" in line["device"] for line in lines)
    assert lines[0]["tokens"] == lines[1]["tokens"] == lines[2]["tokens"] and lines[2]["shards_that_differ"] == 0
    assert [line["link_limited_to_mb_per_second"] for line in lines[3:5]] == [100.0, None]
    assert len(lines[5]["remote_share_of_link"]) == 2
    assert data.main([*command, "--parts", "write"]) == 2
    assert "give an empty --work" in capsys.readouterr().err


def test_a_link_gives_each_byte_its_time(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    link = Link(1000.0)
    for _ in range(3):  # three connections at once share it
        link.wait(500)
    assert slept == [0.5, 1.0, 1.5]
    now[0] = 200.0  # idle time is not saved up
    link.wait(100)
    assert abs(slept[-1] - 0.1) < 1e-9
    Link(None).wait(1 << 40)
    assert len(slept) == 4
