"""Open and seek in a very large corpus: a generated data set of 200 M documents and 150 B tokens, its tars holes in sparse files.

Prints one JSON line: seconds to generate, to open the data set and the stream, milliseconds for sequences at random positions of
the whole corpus (cold: other shards every time), and the memory of one process and of several that share a host.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

EPILOG = """example:
  python -m benchmarks.data_index --folder /tmp/huge > benchmarks/results/data_index.jsonl"""
TAR_BYTES = 64 << 20
MEMBER_TOKENS = 1 << 19


def generate(folder: Path, documents: int, tokens: int) -> int:
    """Indices and a manifest as data_prep/shard.py writes them; returns the number of shards. Hashes of tars are made up."""
    from swax_megatron.data.index import IndexHeader, encode_index

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    shard_tokens = TAR_BYTES // 2 - (1 << 20)
    shards = -(-tokens // shard_tokens)
    mean = tokens / documents
    entries = []
    for number in range(shards):
        count = round(shard_tokens / mean)
        lengths = np.maximum(2, random.lognormal(np.log(mean) - 0.5, 1.0, count)).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        firsts = np.unique(np.searchsorted(starts[:-1], np.arange(0, starts[-1], MEMBER_TOKENS)))
        firsts = firsts[firsts < count]
        offsets = 512 + (starts[firsts] * 2 + np.arange(len(firsts)) * 4096 + 511) // 512 * 512
        size = int(offsets[-1] + 2 * (starts[-1] - starts[firsts[-1]]) + 4096) // 512 * 512
        members = np.stack([offsets, starts[firsts], firsts, np.zeros_like(firsts)], axis=1)
        index = encode_index(IndexHeader(count, int(starts[-1]), len(firsts), size, 2, False), members, starts)
        tar, idx = f"shard-{number:06d}.tar", f"shard-{number:06d}.idx"
        (folder / idx).write_bytes(index)
        with open(folder / tar, "wb") as file:
            file.truncate(size)
        entry = {"file": tar, "sha256": hashlib.sha256(tar.encode()).hexdigest(), "bytes": size, "documents": count}
        entry |= {"tokens": int(starts[-1]), "index": idx, "index_bytes": len(index)}
        entries.append({**entry, "index_sha256": hashlib.sha256(index).hexdigest()})
    (folder / "tokenizer.model").write_bytes(b"not read")
    digest = hashlib.sha256(b"not read").hexdigest()
    special = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    manifest: dict[str, Any] = {"format_version": 1, "dtype": "uint16", "loss_mask": False, "totals": {"text_bytes": 0}, "shards": entries}
    manifest["tokenizer"] = {"file": "tokenizer.model", "sha256": digest, "vocab_size": 32768, **special}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return shards


def memory() -> dict[str, float]:
    """MB of this process: its share of what is mapped, what is its own, and the peak that counts all mapped pages in full."""
    rollup = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    proportional, anonymous = (int(rollup[key].split()[0]) / 1024 for key in ("Pss", "Anonymous"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"proportional_mb": round(proportional), "anonymous_mb": round(anonymous), "peak_resident_mb": round(peak)}


def use(folder: Path, length: int, positions: int, seed: int) -> dict[str, Any]:
    """Open, read at random positions of the whole corpus, then in order."""
    from swax_megatron.data.shards import ShardedDataset
    from swax_megatron.data.stream import SequenceStream

    started = time.perf_counter()
    stream = SequenceStream(ShardedDataset(folder, "size"), length, 1)  # its tars have no content that could be hashed
    opened = time.perf_counter() - started
    ids, mask = np.empty(length + 1, np.uint16), np.empty(length + 1, bool)
    cold, used = [], []
    for index in np.random.default_rng(seed).integers(0, 2 * stream.per_epoch, positions).tolist():
        started, processor = time.perf_counter(), time.process_time()
        stream.read_into(index, ids, mask)
        cold.append(1e3 * (time.perf_counter() - started))
        used.append(1e3 * (time.process_time() - processor))
    after_random = memory()
    for index in range(2000):
        stream.read_into(index, ids, mask)
    started = time.perf_counter()
    for index in range(2000, 6000):
        stream.read_into(index, ids, mask)
    rate = 4000 * length / (time.perf_counter() - started) / 1e6
    return {
        "open_seconds": round(opened, 2),
        "cold_position_ms": _spread(cold),
        "cold_position_processor_ms": _spread(used),
        "in_order_million_tokens_per_second": round(rate),
        "after_random": after_random,
        "after_in_order": memory(),
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": round(statistics.median(values), 2), "p99": round(ordered[int(0.99 * len(ordered))], 2), "max": round(ordered[-1], 2)}


def _use_together(folder: Path, length: int, positions: int, seed: int, barrier: Any, results: Any) -> None:
    found = use(folder, length, positions, seed)
    barrier.wait()
    results.put((found, memory()))
    barrier.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_index", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="where the data set is generated, if it is not there yet (about 2 GB)")
    parser.add_argument("--documents", type=int, default=200_000_000, help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=150_000_000_000, help="default %(default)s")
    parser.add_argument("--length", type=int, default=16384, help="T in tokens (default %(default)s)")
    parser.add_argument("--positions", type=int, default=300, help="random positions a process (default %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="readers that share the host in the second part (default %(default)s)")
    options = parser.parse_args(argv)
    folder, line = Path(options.folder), {}
    if not folder.exists():
        started = time.perf_counter()
        generate(folder, options.documents, options.tokens)
        line["generate_seconds"] = round(time.perf_counter() - started, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    line |= {key: sum(entry[key] for entry in manifest["shards"]) for key in ("documents", "tokens")} | {"shards": len(manifest["shards"])}
    context = multiprocessing.get_context("spawn")
    for name, processes in (("one", 1), ("several", options.processes)):
        barrier, results = context.Barrier(processes), context.Queue()
        arguments = (folder, options.length, options.positions)
        started = [context.Process(target=_use_together, args=(*arguments, seed, barrier, results)) for seed in range(processes)]
        for process in started:
            process.start()
        found = [results.get() for _ in started]
        for process in started:
            process.join()
        if name == "one":
            line["one_process"] = found[0][0]
        else:
            total = sum(each["proportional_mb"] for _, each in found)
            opens = max(each["open_seconds"] for each, _ in found)
            line["host"] = {"processes": processes, "memory_mb": total, "slowest_open_seconds": opens}
    line |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(), "numpy": np.__version__}
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
