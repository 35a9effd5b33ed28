"""The whole way of data on one real corpus in one run: sharding, equality of ids, reading, remote reading, memory, a huge index.

Shards the corpus with data_prep/shard.py and with the peers' tools; compares our ids with sentencepiece's; reads the shards just made
with our reader and the peers' (each in its own format); reads them over an HTTP link of limited speed; opens a generated
data set of 200 M documents. Every part runs alone, one after another. Writes one JSON line a measurement, with device, versions
and load, to --results, and last a line that sets ours beside the peers. The parts can also be run by themselves: benchmarks.data_write,
data_read, data_index.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import data_read, data_write

EPILOG = """example (peers/bin/python has webdataset, mosaicml-streaming, litdata, megatron-core, sentencepiece, tokenizers, gigatoken):
  python -m benchmarks.data --corpus corpus.jsonl --tokenizer tokenizer.model --work /tmp/bench \\
      --peers-python peers/bin/python --megatron Megatron-LM --results benchmarks/results/data.jsonl"""
OURS = "ours-gigatoken"  # the folder that data_write.cases gives our data set
Line = dict[str, Any]


def device() -> Line:
    """The machine, as far as it decides these figures."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    name = next((value.strip() for key, value in facts.items() if key.strip() == "model name"), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": f"{os.cpu_count()} cores, {name}, {memory / 2**30:.0f} GiB", "python": platform.python_version()}


def write(options: argparse.Namespace) -> Iterator[Line]:
    """Sharding, by ours and every peer there is."""
    folder = options.work / "written"
    if folder.exists():
        raise ValueError(f"{folder} exists: give an empty --work, so that every program writes anew, or leave out the part write")
    folder.mkdir()
    yield from data_write.lines(options, folder)


def ids(options: argparse.Namespace) -> Iterator[Line]:
    """Whether our fast encoder and sentencepiece made the same shards, byte by byte: then the ids of every document are equal."""
    made = [json.loads((options.work / "written" / name / "manifest.json").read_text()) for name in (OURS, "ours-sentencepiece")]
    shards = [[entry["sha256"] for entry in each["shards"]] for each in made]
    different = sum(first != second for first, second in zip(*shards, strict=False)) + abs(len(shards[0]) - len(shards[1]))
    totals = made[0]["totals"]
    yield {"documents": totals["documents"], "tokens": totals["tokens"], "shards": len(shards[0]), "shards_that_differ": different}


def read(options: argparse.Namespace) -> Iterator[Line]:
    """Reading the shards just made, each reader in a process of its own."""
    peers = list(data_read.PEERS) if options.peers_python else []
    yield from data_read.lines(_reading(options, [*data_read.OURS, *peers]))


def remote(options: argparse.Namespace) -> Iterator[Line]:
    """Reading over HTTP, the link limited and not."""
    for rate in (options.link_mb, None):
        yield from data_read.lines(_reading(options, ["http"], rate))


def _reading(options: argparse.Namespace, readers: list[str], link_mb: float | None = None) -> argparse.Namespace:
    python = str(options.peers_python or sys.executable)
    common = {"length": options.length, "repetitions": options.repetitions, "peers_python": python, "link_mb": link_mb}
    work = options.work / "peers"
    work.mkdir(exist_ok=True)
    return argparse.Namespace(readers=readers, data=str(options.work / "written" / OURS), work=str(work), **common)


def index(options: argparse.Namespace) -> Iterator[Line]:
    """Opening and seeking in a very large data set."""
    command = [sys.executable, "-m", "benchmarks.data_index", "--folder", str(options.work / "huge"), "--length", str(options.length)]
    command += ["--documents", str(options.index_documents), "--tokens", str(750 * options.index_documents)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    yield json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"failed": done.stderr.strip().splitlines()[-1]}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "write": write,
    "ids": ids,
    "read": read,
    "remote": remote,
    "index": index,
}


def summary(lines: list[Line]) -> Line:
    """Ours beside the peers: how many times as fast, by wall clock and by processor time, and the memory of our processes."""
    whole = [line for line in lines if "failed" not in line]
    found: Line = {"failed": [line.get("program") or line.get("reader") or line["part"] for line in lines if "failed" in line]}
    for part, name, wall, processor in (
        ("write", "program", "mb_per_second", "mb_per_cpu_second"),
        ("read", "reader", "million_tokens_per_second", "per_processor_second"),
    ):
        mine = next((line for line in whole if line["part"] == part and line[name] in ("swax_megatron", "ours")), None)
        others = [line for line in whole if line["part"] == part and line is not mine]
        if mine:
            found[part] = {"wall": mine[wall], "processor": mine[processor]}
            found[f"{part}_times"] = {o[name]: [round(mine[wall] / o[wall], 2), round(mine[processor] / o[processor], 2)] for o in others}
    peaks = {line["program"]: line["peak_mb"] for line in whole if line["part"] == "write"}
    peaks |= {line["reader"]: line["peak_resident_mb"] for line in whole if line["part"] == "read"}
    found["peak_mb"] = peaks
    found["remote_share_of_link"] = [line["cold_share_of_link"] for line in whole if line["part"] == "remote"]
    return {"part": "summary", **found}


def run(options: argparse.Namespace) -> Iterator[Line]:
    """Every line of the parts chosen, then the summary."""
    about, lines = device(), []
    for part in options.parts:
        for line in PARTS[part](options):
            load = {"load": round(os.getloadavg()[0], 1), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            lines.append({"part": part, **line, **about, **load})
            yield lines[-1]
    yield {**summary(lines), **about}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_write.add_arguments(parser)
    parser.add_argument("--work", type=Path, required=True, help="a folder for everything that is written; is not removed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--length", type=int, default=16384, help="T in tokens (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="epochs that are timed (default %(default)s)")
    parser.add_argument("--link-mb", type=float, default=100.0, help="MB a second of the limited link (default %(default)s)")
    parser.add_argument("--index-documents", type=int, default=200_000_000, help="of the huge data set (default %(default)s)")
    options = parser.parse_args(argv)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        for line in run(options):
            print(json.dumps(line), flush=True)
            if options.results:
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
