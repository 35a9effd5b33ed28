"""Time reading packed sequences in one process: our shards against webdataset, MosaicML Streaming, litdata and Megatron.

Every reader runs in a process of its own, on the same documents in its own format (written from our shards on first use), with
the files in the page cache, and gives shuffled rows of T + 1 ids. Prints one JSON line a reader: million tokens a second (T a row)
by wall clock and by processor time of the process (the fairer one on a busy machine), each the median of the repetitions; peak
resident memory, which counts mapped files, and anonymous memory, which does not; versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.data_peers import PEERS, Rows, prepare

EPILOG = """example:
  python -m benchmarks.data_read --data data/code --work /tmp/peers --peers-python peers/bin/python > data_read.jsonl"""


def ours(packing: str, verify: str = "size") -> Callable[[Path, int], Rows]:
    """Rows as ``Mixture.load`` takes them from the stream: ids as stored, and which of them may be targets.

    verify: "use" hashes every shard, as training does in a process's first epoch; every epoch here opens the data anew.
    """

    def read(data: Path, length: int) -> Rows:
        import numpy as np

        from swax_megatron.data.rows import open_stream
        from swax_megatron.data.shards import ShardedDataset
        from swax_megatron.data.stream import SHUFFLE_TOKENS

        stream = open_stream(ShardedDataset(data, verify), length, 1, packing, SHUFFLE_TOKENS)
        for index in range(stream.per_epoch):
            ids, mask = np.empty(length + 1, stream.dataset.dtype), np.empty(length + 1, bool)
            stream.read_into(index, ids, mask)
            yield ids

    return read


def ours_batches(workers: int) -> Callable[[Path, int], Rows]:
    """Inputs, targets, loss mask, document-local positions and boundaries, as training gets them; with or without threads."""

    def read(data: Path, length: int) -> Rows:
        from swax_megatron.data.mixture import Mixture
        from swax_megatron.data.packing import pack
        from swax_megatron.data.prefetch import Prefetcher
        from swax_megatron.data.shards import ShardedDataset
        from swax_megatron.data.stream import SequenceStream

        stream = SequenceStream(ShardedDataset(data, "size"), length, 1)
        mixture = Mixture([stream], [1.0], ["code"], 1)

        def plan(state: Any, step: int) -> tuple[list, Any]:
            rows, after = mixture.plan(state, 8)
            return [[row] for row in rows], after

        def load(piece: list) -> Any:
            rows = mixture.load(piece)
            return pack(rows.ids_bt1, rows.mask_bt1, stream.dataset.eos_id)

        state, steps = mixture.initial_state(), stream.per_epoch // 8
        prefetcher = Prefetcher(plan, load, workers, 2, steps)
        for step in range(steps):
            batches, state = prefetcher.take(state, step)
            yield from batches
        prefetcher.close()

    return read


OURS: dict[str, Callable[[Path, int], Rows]] = {
    "ours": ours("concatenate"),
    "ours, sha256 of every shard": ours("concatenate", "use"),
    "ours, best fit": ours("best_fit"),
    "ours, whole batches": ours_batches(0),
    "ours, whole batches, 2 threads": ours_batches(2),
}


def measure(rows: Callable[[], Rows], length: int, repetitions: int, warm_rows: int) -> dict[str, Any]:
    """Median rates over whole epochs, the first one not counted."""
    for number, _ in enumerate(rows()):
        if number == warm_rows:
            break
    wall, processor, count = [], [], 0
    for _ in range(repetitions):
        started, used = time.perf_counter(), time.process_time()
        count = sum(1 for _ in rows())
        wall.append(count * length / (time.perf_counter() - started) / 1e6)
        processor.append(count * length / (time.process_time() - used) / 1e6)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "rows": count,
        "million_tokens_per_second": round(statistics.median(wall), 1),
        "per_processor_second": round(statistics.median(processor), 1),
        "all": [round(rate, 1) for rate in wall],
        "peak_resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "anonymous_mb": round(int(status["RssAnon"].split()[0]) / 1024),
    }


def read_one(name: str, data: Path, work: Path, length: int, repetitions: int) -> dict[str, Any]:
    """Measure one reader in this process."""
    packages = ["numpy", "torch"]
    if name in OURS:
        source, read = data, OURS[name]
    else:
        source, read, package = prepare(name, data, work), *PEERS[name][1:]
        packages.append(package)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        with open(file, "rb") as content:
            while content.read(1 << 24):  # into the page cache
                pass
    found = measure(lambda: read(source, length), length, repetitions, warm_rows=2000)
    return {"reader": name, "sequence_length": length, **found, "versions": {each: _version(each) for each in packages}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def remote(data: Path, length: int, work: Path, link_mb: float | None = None) -> dict[str, Any]:
    """Reading over HTTP from a server on this machine, cold and warm cache, against what the link gives by itself.

    link_mb: MB a second that the server gives at most.
    """
    import tempfile
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    from swax_megatron.data.cache import FileCache
    from swax_megatron.data.shards import ShardedDataset
    from swax_megatron.data.stream import SequenceStream

    command = [sys.executable, "-m", "benchmarks.http_link", str(data)]
    command += ["--mb-per-second", str(link_mb)] if link_mb else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    url = server.stdout.readline().strip()
    try:
        tars = sorted(path.name for path in data.glob("*.tar"))

        def fetch(name: str) -> int:
            with urllib.request.urlopen(f"{url}/{name}") as answer, tempfile.TemporaryFile(dir=work) as file:
                size = 0
                while block := answer.read(1 << 20):
                    size += file.write(block)
                return size

        for tar in tars:
            (data / tar).read_bytes()
        with tempfile.TemporaryDirectory(dir=work) as folder:
            started = time.perf_counter()
            with ThreadPoolExecutor(4) as pool:
                size = sum(pool.map(fetch, tars))
            link = size / (time.perf_counter() - started)
            rates = {}
            for state in ("cold", "warm"):
                dataset = ShardedDataset(url, cache=FileCache(folder, 64 << 30))
                stream = SequenceStream(dataset, length, 1, shuffle_tokens=1 << 27)
                stream.look_ahead = 2
                rates[state] = _timed_epoch(stream)
    finally:
        server.terminate()
        server.wait()
    tokens = size / 2
    return {
        "reader": "ours, HTTP on this machine",
        "sequence_length": length,
        "shuffle_tokens": 1 << 27,
        "link_limited_to_mb_per_second": link_mb,
        "link_mb_per_second": round(link / 1e6, 1),
        "cold_share_of_link": round(size / rates["cold"] / link, 3),
        "link_million_tokens_per_second": round(link / 2e6, 1),
        "cold_million_tokens_per_second": round(tokens / rates["cold"] / 1e6, 1),
        "warm_million_tokens_per_second": round(tokens / rates["warm"] / 1e6, 1),
        "versions": {each: _version(each) for each in ("numpy", "fsspec", "aiohttp")},
    }


def _timed_epoch(stream: Any) -> float:
    started = time.perf_counter()
    for index in range(stream.per_epoch):
        stream[index]
    return time.perf_counter() - started


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each reader in an interpreter of its own."""
    for name in options.readers:
        python = sys.executable if name in OURS or name == "http" else options.peers_python
        command = [python, "-m", "benchmarks.data_read", "--data", options.data, "--work", options.work, "--only", name]
        command += ["--length", str(options.length), "--repetitions", str(options.repetitions)]
        command += ["--link-mb", str(options.link_mb)] if options.link_mb else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            yield {"reader": name, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    readers = [*OURS, "http", *PEERS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_read", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a data set of data_prep/shard.py, uint16 ids")
    parser.add_argument("--work", required=True, help="folder for the peers' formats and the cache")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers installed (default: this one)")
    parser.add_argument("--readers", nargs="+", choices=readers, default=readers, metavar="READER", help=f"of: {', '.join(readers)}")
    parser.add_argument("--length", type=int, default=16384, help="T in tokens (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="epochs that are timed (default %(default)s)")
    parser.add_argument("--link-mb", type=float, help="MB a second that the server of the reader http gives at most (default: no limit)")
    parser.add_argument("--only", choices=readers, help=argparse.SUPPRESS)  # one reader, in this process
    options = parser.parse_args(argv)
    data, work = Path(options.data).resolve(), Path(options.work).resolve()
    if not (data / "manifest.json").is_file():
        print(f"error: --data {data} holds no manifest.json: write a data set with data_prep/shard.py", file=sys.stderr)
        return 2
    work.mkdir(parents=True, exist_ok=True)
    if options.only == "http":
        print(json.dumps(remote(data, options.length, work, options.link_mb)))
    elif options.only:
        print(json.dumps(read_one(options.only, data, work, options.length, options.repetitions)))
    else:
        about = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(), "data": data.name}
        for line in lines(options):
            print(json.dumps({**line, **about}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
