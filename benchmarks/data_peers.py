"""The peers of ``benchmarks.data_read``: how each is written from our shards, and how it is read. Imports each only where it is used."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Rows = Iterator[Any]


def documents(data: Path) -> Iterator[np.ndarray]:
    """Every document of a data set, in stored order."""
    from swax_megatron.data.shards import ShardedDataset

    dataset = ShardedDataset(data)
    for shard in range(len(dataset.shards)):
        yield from np.split(np.concatenate(list(dataset.blocks(shard))), dataset.index(shard).starts[1:-1])


def packed(stream: Iterator[np.ndarray], length: int) -> Rows:
    """Documents laid one after another and cut into rows of ``length`` + 1 ids with stride ``length``."""
    row, filled = np.empty(length + 1, np.int64), 0
    for document in stream:
        at = 0
        while at < len(document):
            size = min(length + 1 - filled, len(document) - at)
            row[filled : filled + size] = document[at : at + size]
            filled, at = filled + size, at + size
            if filled == length + 1:
                yield row
                row = np.empty(length + 1, np.int64)
                filled, at = 0, at - 1


# ---- plain webdataset: one sample a document, raw ids ----


def write_webdataset(data: Path, out: Path) -> None:
    tar: tarfile.TarFile | None = None
    size = shard = 0
    for number, document in enumerate(documents(data)):
        if tar is None or size > 64 << 20:
            if tar is not None:
                tar.close()
            tar, size = tarfile.open(out / f"shard-{shard:06d}.tar", "w"), 0
            shard += 1
        info = tarfile.TarInfo(f"{number:09d}.ids")
        info.size = document.nbytes
        tar.addfile(info, io.BytesIO(document.tobytes()))
        size += document.nbytes
    tar.close()


def read_webdataset(out: Path, length: int) -> Rows:
    import webdataset

    tars = sorted(str(tar) for tar in out.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=1).shuffle(1000)
    return packed((np.frombuffer(sample["ids"], np.uint16) for sample in samples), length)


# ---- MosaicML Streaming: one sample a document ----


def write_mosaicml(data: Path, out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"ids": "ndarray:uint16"}, size_limit=64 << 20) as writer:
        for document in documents(data):
            writer.write({"ids": np.array(document)})


def read_mosaicml(out: Path, length: int) -> Rows:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=1, shuffle_seed=1)
    return packed((sample["ids"] for sample in dataset), length)


# ---- litdata: a document a sample; and its TokensLoader, which forgets the documents ----




def write_litdata(data: Path, out: Path) -> None:
    import torch
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(out), chunk_bytes="64MB")
    for number, document in enumerate(documents(data)):
        writer.add_item(number, torch.from_numpy(np.array(document)))
    writer.done()
    writer.merge()


def read_litdata(out: Path, length: int) -> Rows:
    from litdata import StreamingDataset

    return packed((sample.numpy() for sample in StreamingDataset(str(out), shuffle=True, seed=1)), length)


def write_litdata_tokens(data: Path, out: Path) -> None:
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(out), chunk_size=16385 * 2000, item_loader=TokensLoader(block_size=16385))
    for number, document in enumerate(documents(data)):
        writer.add_item(number, torch.from_numpy(np.array(document)))
    writer.done()
    writer.merge()


def read_litdata_tokens(out: Path, length: int) -> Rows:
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    return iter(StreamingDataset(str(out), shuffle=True, seed=1, item_loader=TokensLoader(block_size=length + 1)))


# ---- Megatron: IndexedDataset with plain packing, and GPTDataset ----


def write_megatron(data: Path, out: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(out / "data.bin"), dtype=np.uint16)
    for document in documents(data):
        builder.add_document(torch.from_numpy(np.array(document)), [len(document)])
    builder.finalize(str(out / "data.idx"))


def read_megatron_indexed(out: Path, length: int) -> Rows:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(out / "data"))
    order = np.random.default_rng(1).permutation(len(dataset)).tolist()
    return packed((dataset[number] for number in order), length)


def read_megatron_gpt(out: Path, length: int) -> Rows:
    """Inputs, labels, loss mask and position ids, as training gets them; the attention mask is left out."""
    from types import SimpleNamespace

    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    cache = out / "cache"
    tokenizer = SimpleNamespace(eod=2, pad=-1, vocab_size=32768, unique_identifiers={"name": "none"})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(out / "data")], None),
        split="1",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(out / "data"))
    dataset = GPTDataset(indexed, str(out / "data"), np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
    return (dataset[number] for number in range(len(dataset)))


Reader = tuple[Callable[[Path, Path], None], Callable[[Path, int], Rows], str]
PEERS: dict[str, Reader] = {
    "webdataset": (write_webdataset, read_webdataset, "webdataset"),
    "mosaicml": (write_mosaicml, read_mosaicml, "mosaicml-streaming"),
    "litdata": (write_litdata, read_litdata, "litdata"),
    "litdata-tokens": (write_litdata_tokens, read_litdata_tokens, "litdata"),
    "megatron-indexed": (write_megatron, read_megatron_indexed, "megatron-core"),
    "megatron-gpt": (write_megatron, read_megatron_gpt, "megatron-core"),
}


def prepare(name: str, data: Path, work: Path) -> Path:
    """The corpus in a peer's format, written where it is not there yet."""
    write = PEERS[name][0]
    out = work / write.__name__.removeprefix("write_")
    done = out / "WRITTEN"
    if not done.exists():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        write(data, out)
        done.touch()
    return out
