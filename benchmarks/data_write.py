"""Time sharding of one real corpus by data_prep/shard.py and by other programs, one after another in the same run.

Prints one JSON line a program: MB of text a second of wall time and of processor time, peak memory of its largest process,
tokens, versions. Every program reads the same JSON lines and ends with token ids on disk; start-up is included.

Peers run in an environment of their own (--peers-python, which needs sentencepiece, tokenizers, litdata, mosaicml-streaming,
gigatoken and what Megatron's tools import); Megatron's tools are run from a clone of Megatron-LM (--megatron). What is not
given, or fails, is reported and left out. On a shared machine compare processor time; the load is noted in every line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
EPILOG = """example:
  python -m benchmarks.data_write --corpus corpus.jsonl --tokenizer tokenizer.model \\
      --peers-python peers/bin/python --megatron Megatron-LM --results data_write.jsonl"""
# Megatron-LM's development branch is written for Python 3.12
_MEGATRON = """
import runpy, sys, typing, typing_extensions
typing.override = getattr(typing, "override", typing_extensions.override)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def text_bytes(corpus: Path) -> int:
    """Bytes of UTF-8 text in a file of JSON lines."""
    with open(corpus, "rb") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file if line.strip())


def measured(command: list[str], environment: dict[str, str], log: Path, limit: float) -> dict[str, Any]:
    """Run a command: wall and processor seconds (children included) and the peak memory of its largest process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    peak = [0]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        watch = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
        watch.start()
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            status = process.wait()
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(peak[0] / 1e6)}
    if status:
        lines = log.read_text(errors="replace").strip().splitlines()
        result["failed"] = lines[-1][:300] if lines else f"status {status}"
    return result


def _watch(pid: int, peak: list[int]) -> None:
    try:
        process = psutil.Process(pid)
        while True:
            for each in [process, *process.children(recursive=True)]:
                try:
                    peak[0] = max(peak[0], each.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.2)
    except psutil.Error:
        return


def cases(args: argparse.Namespace, folder: Path) -> list[tuple[str, list[str], dict[str, str], Path]]:
    """(name, command, environment, where the ids go) of every program that can be run."""
    corpus, model, workers = str(args.corpus), str(args.tokenizer), str(args.workers)
    found = []
    for name, encoder in (("swax_megatron", "gigatoken"), ("swax_megatron, sentencepiece", "sentencepiece")):
        out = folder / f"ours-{encoder}"
        command = [sys.executable, str(ROOT / "data_prep/shard.py"), "--input", corpus, "--tokenizer", model, "--out", str(out)]
        found.append((name, [*command, "--workers", workers, "--encoder", encoder], {"PYTHONPATH": str(ROOT)}, out))
    if not args.peers_python:
        return found
    python = str(args.peers_python)
    exported = folder / "huggingface"
    exported.mkdir()
    from swax_megatron.hf.tokenizer import export_tokenizer

    export_tokenizer(model, exported)
    if args.megatron:
        tools, environment = args.megatron / "tools", {"PYTHONPATH": str(args.megatron), "TOKENIZERS_PARALLELISM": "false"}
        common = ["--input", corpus, "--append-eod", "--output-prefix"]
        fast = [python, "-c", _MEGATRON, str(tools / "preprocess_data_fast.py"), "--tokenizer-type", "HuggingFaceTokenizer"]
        fast += ["--tokenizer-model", str(_for_gigatoken(model, exported, folder)), "--use-gigatoken", *common, str(folder / "fast")]
        slow = [python, "-c", _MEGATRON, str(tools / "preprocess_data.py"), "--tokenizer-type", "SentencePieceTokenizer"]
        slow += ["--tokenizer-model", model, "--workers", workers, *common, str(folder / "slow")]
        found.append(("Megatron preprocess_data_fast.py", fast, environment, folder / "fast_text_document.bin"))
        found.append(("Megatron preprocess_data.py", slow, environment, folder / "slow_text_document.bin"))
    for name, kind in (("HF tokenizers", "tokenizers"), ("litdata", "litdata"), ("MosaicML MDS", "mds")):
        out = folder / kind
        command = [python, str(ROOT / "benchmarks" / "write_peers.py"), kind, "--input", corpus, "--out", str(out), "--workers", workers]
        found.append((name, [*command, "--tokenizer", str(exported / "tokenizer.json") if kind == "tokenizers" else model], {}, out))
    return found


def _for_gigatoken(model: str, exported: Path, folder: Path) -> Path:
    """A Hugging Face folder as gigatoken converts the model itself: it cannot load our export (its Split pre-tokenizer)."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    own = folder / "huggingface-gigatoken"
    own.mkdir()
    content = sentencepiece_to_tokenizer_json(Path(model).read_bytes())
    (own / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copy(exported / "tokenizer_config.json", own)
    return own


def tokens_written(out: Path) -> int | None:
    """How many ids a program left, where that can be told."""
    if (out / "manifest.json").exists():
        return json.loads((out / "manifest.json").read_text())["totals"]["tokens"]
    if out.suffix == ".bin" and out.exists():
        return out.stat().st_size // 2
    count = out / "tokens.txt"
    return int(count.read_text()) if count.exists() else None


def versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages in an environment."""
    code = f"import importlib.metadata as m, json\nf = {names!r}\nd = {{x.metadata['Name']: x.version for x in m.distributions()}}\n"
    code += "print(json.dumps({n: d[n] for n in f if n in d}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def lines(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Run every program that can be run, one after another, and leave what it writes in ``folder``; a line each."""
    size = text_bytes(args.corpus)
    about = {"corpus_mb": round(size / 1e6, 1), "workers": args.workers, "cores": os.cpu_count(), "python": sys.version.split()[0]}
    ours = versions(sys.executable, ("sentencepiece", "gigatoken", "numpy"))
    peers = ("sentencepiece", "gigatoken", "tokenizers", "litdata", "mosaicml-streaming", "numpy", "torch", "transformers")
    theirs = versions(str(args.peers_python), peers) if args.peers_python else {}
    if args.megatron:
        theirs["Megatron-LM"] = subprocess.run(
            ["git", "-C", str(args.megatron), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    for name, command, environment, out in cases(args, folder):
        if args.only and name not in args.only:
            continue
        result = measured(command, environment, folder / "log", args.limit)
        line: dict[str, Any] = {"program": name, **result}
        if "failed" not in result:
            line["mb_per_second"] = round(size / 1e6 / result["seconds"], 2)
            line["mb_per_cpu_second"] = round(size / 1e6 / result["cpu_seconds"], 2)
            line["tokens"] = tokens_written(out)
        yield {**line, **about, "load": round(os.getloadavg()[0], 1), "versions": ours if name.startswith("swax") else theirs}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sharded, by whom."""
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines with a key text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece BPE model")
    parser.add_argument("--peers-python", type=Path, help="the interpreter of the peers' environment")
    parser.add_argument("--megatron", type=Path, help="a clone of Megatron-LM")
    parser.add_argument("--workers", type=int, default=2, help="processes each program may use (default %(default)s)")
    parser.add_argument("--only", nargs="+", help="names of programs that shard; default: all")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each program that shards (default %(default)s)")
    parser.add_argument("--results", type=Path, help="a file to append the lines to")


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-write-") as temporary:
        for line in lines(args, Path(temporary)):
            print(json.dumps(line), flush=True)
            if args.results:
                with open(args.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
