"""Remote data sets: the same sequences as from the disk, through faults, within the cache's limit."""

from __future__ import annotations

import hashlib
import multiprocessing
import resource
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from swax_megatron.data import cache as cache_module
from swax_megatron.data.cache import CacheError, FileCache
from swax_megatron.data.rows import open_stream
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.storage import Reader, RemoteError, RemoteFolder, read_file
from swax_megatron.data.stream import SequenceStream
from tests.http_server import Faults, serve
from tests.texts import random_documents, write_ids

SHUFFLE = 2000  # tokens: about two shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("remote") / "set", random_documents(500))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    stream = SequenceStream(ShardedDataset(folder), 32, seed=1, shuffle_tokens=SHUFFLE)
    return [stream[i][0].tolist() for i in range(2 * stream.per_epoch)]


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, Faults]]:
    with serve(folder.parent) as (url, faults):
        yield f"{url}/set", faults


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swax_megatron.data.storage._LONGEST_PAUSE", 0.01)


def opened(url: str, cache: FileCache, **options: object) -> SequenceStream:
    return SequenceStream(ShardedDataset(url, cache=cache, **options), 32, seed=1, shuffle_tokens=SHUFFLE)


def test_http_gives_what_the_disk_gives(server, expected, tmp_path):
    url, faults = server
    cache = FileCache(tmp_path, 1 << 20)
    stream = opened(url, cache)
    assert [stream[i][0].tolist() for i in range(len(expected))] == expected
    again = opened(url, cache)
    assert again[7][0].tolist() == expected[7]
    tars = {name: n for name, n in faults.requests.items() if name.endswith((".tar", ".idx"))}
    assert len(tars) == 2 * len(stream.dataset.shards) and set(tars.values()) == {1}  # each was fetched once, over two epochs and openings


def test_file_urls_and_commands(folder, expected, tmp_path):
    for path in (folder.as_uri(), f"pipe:cat {shlex.quote(str(folder))}/{{file}} | cat"):
        stream = opened(path, FileCache(tmp_path / str(len(path)), 1 << 20))
        assert [stream[i][0].tolist() for i in range(0, len(expected), 5)] == expected[::5]


def test_best_fit_rows_over_http(server, folder, tmp_path):
    local = open_stream(ShardedDataset(folder), 32, 1, "best_fit", SHUFFLE)
    remote = open_stream(ShardedDataset(server[0], cache=FileCache(tmp_path, 1 << 20)), 32, 1, "best_fit", SHUFFLE)
    assert remote.statistics == local.statistics
    assert all((remote[i][0] == local[i][0]).all() for i in range(0, local.per_epoch, 3))


def test_failures_on_the_way_are_tried_again(server, expected, tmp_path):
    url, faults = server
    faults.by_name = {"manifest.json": ["status", "status"], "tokenizer.model": ["cut"]}
    faults.by_name |= {f"shard-{n:06d}.tar": [["status"], ["cut", "flip"], ["flip"]][n % 3] for n in range(8)}
    faults.by_name |= {f"shard-{n:06d}.idx": [["flip"], ["status"], ["cut"]][n % 3] for n in range(8)}
    stream = opened(url, FileCache(tmp_path, 1 << 20))
    assert [stream[i][0].tolist() for i in range(stream.per_epoch)] == expected[: stream.per_epoch]
    assert stream.dataset.storage.retried >= 5
    assert not any(left for left in faults.by_name.values() if left)


def test_what_stays_broken_is_told(server, folder, tmp_path):
    url, faults = server
    dataset = ShardedDataset(url, cache=FileCache(tmp_path, 1 << 20), retries=2)
    faults.by_name = {"shard-000000.tar": ["status"] * 9, "shard-000001.tar": ["flip"] * 9, "shard-000002.tar": ["cut"] * 9}
    with pytest.raises(RemoteError, match="shard-000000.tar cannot be read after 3 tries: 503"):
        dataset.tar(0)
    with pytest.raises(ValueError, match="shard-000001.tar cannot be read after 3 tries: .* is damaged: its sha256 is not the manifest's"):
        dataset.tar(1)
    with pytest.raises(OSError, match="shard-000002.tar cannot be read after 3 tries"):
        dataset.tar(2)
    faults.requests.clear()
    entry = dict(dataset.shards[3], file="shard-999999.tar")
    with pytest.raises(RemoteError, match="shard-999999.tar does not exist"):
        dataset.storage.open(entry["file"], entry["bytes"], "0" * 64)
    assert faults.requests["shard-999999.tar"] <= 2  # not tried again
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]  # nothing half-written
    with pytest.raises(ValueError, match="no data set at http.*nowhere.*does not exist"):
        ShardedDataset(f"{url}/nowhere", cache=FileCache(tmp_path, 1 << 20))
    with pytest.raises(RemoteError, match="ended with status 3: sorry"):
        read_file("pipe:echo sorry >&2; echo {file}; exit 3", "manifest.json", retries=0)
    with pytest.raises(ValueError, match="must hold {file}"):
        read_file("pipe:cat manifest.json", "manifest.json")
    with pytest.raises(ValueError, match="nosuch://x cannot be opened"):
        read_file("nosuch://x", "manifest.json")
    with pytest.raises(ValueError, match="needs a cache folder: set data.cache"):
        ShardedDataset(url)
    with pytest.raises(ValueError, match="damaged='skip' with the remote data set"):
        ShardedDataset(url, cache=FileCache(tmp_path, 1 << 20), damaged="skip")


def test_shards_named_are_never_fetched(server, folder, tmp_path):
    url, faults = server
    stream = opened(url, FileCache(tmp_path, 1 << 20), skip=["shard-000001.tar"])
    local = SequenceStream(ShardedDataset(folder, skip=["shard-000001.tar"]), 32, seed=1, shuffle_tokens=SHUFFLE)
    assert all((stream[i][0] == local[i][0]).all() for i in range(stream.per_epoch))
    assert "shard-000001.tar" not in faults.requests and "shard-000000.tar" in faults.requests


def test_a_full_disk_is_not_the_remote_s_fault(folder, tmp_path):
    """Told as what it is, and not tried again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    pipe = f"pipe:cat {shlex.quote(str(folder))}/{{file}}; echo x: No space left on device >&2; false"
    sentence = "the disk that fetched files are written to is full or a limit is reached .*make room, lower"
    for name, url in (("url", folder.as_uri()), ("pipe", pipe)):
        cache = FileCache(tmp_path / name, 1 << 20)
        dataset = ShardedDataset(folder)
        remote = RemoteFolder(url, cache)
        entry = dataset.shards[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a file of more bytes fails, as on a full disk
        try:
            with pytest.raises(CacheError, match=sentence):
                remote.open(entry["file"], entry["bytes"], entry["sha256"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert remote.retried == 0


def test_a_name_in_a_manifest_is_no_command(tmp_path):
    """A manifest from elsewhere may not reach the shell or another folder."""
    folder = RemoteFolder("pipe:cat " + shlex.quote(str(tmp_path)) + "/{file}", FileCache(tmp_path / "cache", 1 << 20), retries=0)
    with pytest.raises(OSError):
        folder.read(f"x; touch {tmp_path}/broken")
    assert not (tmp_path / "broken").exists()


def test_files_are_fetched_ahead(server, tmp_path):
    url, faults = server
    stream = opened(url, FileCache(tmp_path, 1 << 20))
    stream.look_ahead = 2
    stream[0]
    deadline = time.monotonic() + 20
    while len([name for name in faults.requests if name.endswith(".tar")]) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 <= len([name for name in faults.requests if name.endswith(".tar")]) < len(stream.dataset.shards)


# ---- the cache ----


def content(number: int, size: int = 1000) -> tuple[str, bytes]:
    data = np.random.default_rng(number).bytes(size)
    return hashlib.sha256(data).hexdigest(), data


def get(cache: FileCache, number: int) -> Reader:
    name, data = content(number)
    reader = Reader(cache.open(name, len(data), lambda target: None if target.write_bytes(data) else None), name)
    assert whole(reader) == data
    return reader


def whole(reader: Reader) -> bytes:
    found = np.empty(1000, np.uint8)
    reader.read_into(0, found)
    return found.tobytes()


def test_the_file_used_longest_ago_goes_first(tmp_path):
    cache = FileCache(tmp_path, 3500)
    for number in (1, 2, 3):
        get(cache, number)
        time.sleep(0.01)
    get(cache, 1)
    get(cache, 4)
    names = {path.name for path in tmp_path.iterdir()} - {"locks"}
    assert names == {content(number)[0] for number in (1, 3, 4)} and cache.bytes() == 3000


def test_an_open_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_PATIENCE", 0.2)
    cache = FileCache(tmp_path, 2500)
    held = [get(cache, 1), get(cache, 2)]
    with pytest.raises(CacheError, match="no room for a file of 1000 bytes: its limit is 2500 bytes and 2000 are in use; raise"):
        get(cache, 3)
    held.pop()
    get(cache, 3)
    assert whole(held[0]) == content(1)[1]
    with pytest.raises(CacheError, match="no room for a file of 9000 bytes"):
        cache.open(content(9, 9000)[0], 9000, lambda target: None)


def test_what_a_killed_process_left_is_removed(tmp_path):
    cache = FileCache(tmp_path, 2500)
    (tmp_path / f"{content(7)[0]}.2000.part").write_bytes(b"half")
    get(cache, 1)
    get(cache, 2)
    assert cache.bytes() == 2000 and not list(tmp_path.glob("*.part"))


def hammer(folder: Path, seed: int, worst: object) -> None:
    """One of several processes that share a cache of five files' size and want twelve."""
    cache, random = FileCache(folder, 5000), np.random.default_rng(seed)
    for _ in range(150):
        held = get(cache, int(random.integers(12)))
        used = cache.bytes()
        with worst.get_lock():
            worst.value = max(worst.value, used)
        del held


def test_the_limit_holds_for_several_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    worst = context.Value("q", 0)
    processes = [context.Process(target=hammer, args=(tmp_path, seed, worst)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 4000 <= worst.value <= 5000
