"""The data set folder: what is written is read back, and what is damaged is refused with a reason."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from swax_megatron.data.index import read_index
from swax_megatron.data.shards import ShardedDataset, fingerprint
from swax_megatron.data.statistics import corpus_token_counts, unigram_entropy
from swax_megatron.data.writer import DatasetWriter
from tests.texts import EOS, random_documents, write_ids


def stored(dataset: ShardedDataset) -> list[list[int]]:
    counts = enumerate(dataset.shard_documents.tolist())
    return [dataset.document(shard, number).tolist() for shard, count in counts for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_ids(tmp_path / "set", random_documents(300))


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("vocab_size, dtype", [(300, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_documents_come_back(vocab_size, dtype, tmp_path):
    documents = random_documents(300, vocab_size=vocab_size)
    documents[7] = [vocab_size - 1] * 3000 + [EOS]  # longer than a member and a shard's rest
    dataset = ShardedDataset(write_ids(tmp_path / "set", documents, vocab_size=vocab_size), verify="sha256", max_open_shards=2)
    assert dataset.dtype.name == dtype and len(dataset.shards) > 3
    assert stored(dataset) == documents
    assert [ids.tolist() for s in range(len(dataset.shards)) for ids in np.split(*flat(dataset, s))] == documents
    assert (dataset.documents, dataset.tokens) == (300, sum(map(len, documents)))
    assert dataset.document_mask(0, 0).all()


def flat(dataset: ShardedDataset, shard: int) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(list(dataset.blocks(shard))), dataset.index(shard).starts[1:-1]


def test_loss_masks_come_back(tmp_path):
    documents = random_documents(200)
    masks = [np.random.default_rng(i).integers(0, 2, len(ids)).tolist() for i, ids in enumerate(documents)]
    dataset = ShardedDataset(write_ids(tmp_path / "set", documents, masks))
    assert stored(dataset) == documents
    places = [(s, j) for s, count in enumerate(dataset.shard_documents.tolist()) for j in range(count)]
    assert [dataset.document_mask(*place).tolist() for place in places] == [[bool(bit) for bit in mask] for mask in masks]


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    writer = DatasetWriter(tmp_path, 10)
    for ids, lengths, mask in (([1, 2], [1], None), ([1, 2], [2, 0], None), ([1, 2], [2], [1]), ([1, 10], [2], None)):
        with pytest.raises(ValueError, match="fit"):
            writer.add(np.array(ids), np.array(lengths), mask=None if mask is None else np.array(mask))
    writer.add(np.array([1, 2]), np.array([2]))
    with pytest.raises(ValueError, match="every block"):
        writer.add(np.array([1, 2]), np.array([2]), mask=np.array([1, 1]))
    with pytest.raises(ValueError, match="no document"):
        DatasetWriter(tmp_path, 10).finish(tmp_path / "any", {})


def test_tokenizer_is_checked(folder):
    dataset = ShardedDataset(folder)
    dataset.check_tokenizer(sha256=fingerprint(folder / "tokenizer.model"), vocab_size=300)
    with pytest.raises(ValueError, match="was written with the tokenizer"):
        dataset.check_tokenizer(sha256="0" * 64)
    with pytest.raises(ValueError, match="300 ids, not 512: set vocab_size=300"):
        dataset.check_tokenizer(vocab_size=512)
    (folder / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(ValueError, match="is not the tokenizer that wrote"):
        ShardedDataset(folder)


def test_missing_parts(folder, tmp_path):
    with pytest.raises(ValueError, match="verify='md5'"):
        ShardedDataset(folder, verify="md5")
    with pytest.raises(ValueError, match="no data set in .*write one with data_prep/shard.py"):
        ShardedDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"it holds the data sets set: give {folder}"):
        ShardedDataset(folder.parent)
    (folder / "shard-000001.tar").rename(folder / "moved")
    with pytest.raises(ValueError, match="shard-000001.tar is missing"):
        ShardedDataset(folder)
    (folder / "moved").rename(folder / "shard-000001.tar")
    (folder / "shard-000002.idx").unlink()
    with pytest.raises(ValueError, match="shard-000002.idx is missing"):
        ShardedDataset(folder)
    (folder / "manifest.json").write_text('{"format_ver')
    with pytest.raises(ValueError, match="is not JSON"):
        ShardedDataset(folder)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"format_version": 2}, "format_version 2, newer than this program's 1: update"),
        ({"format_version": None}, "has no format_version"),
        ({"dtype": "object"}, "dtype='object'"),
        ({"shards": []}, "lists no shard"),
        ({"shards": [{"file": "x.tar"}]}, "lacks or misstates 'sha256'"),
        ({"tokenizer": None}, "lacks or misstates"),
        ({"tokenizer": {"file": "../secret", "sha256": "", "vocab_size": 9, "eos_id": 2}}, "only plain names inside"),
    ],
)
def test_bad_manifests(changes, sentence, folder):
    edit_manifest(folder, **changes)
    with pytest.raises(ValueError, match=sentence):
        ShardedDataset(folder)


def test_truncated_tar(folder):
    tar = folder / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-000001.tar has \d+ bytes where the manifest states \d+"):
        ShardedDataset(folder)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000000.idx"])
def test_a_flipped_byte_is_found_by_sha256(name, folder):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    ShardedDataset(folder)  # sizes still agree
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        ShardedDataset(folder, verify="sha256")


def test_an_index_that_does_not_fit(folder):
    first, second = folder / "shard-000000.idx", folder / "shard-000001.idx"
    original = first.read_bytes()
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    first.write_bytes(second.read_bytes())
    edit_manifest(folder, shards=[{**entries[0], "index_bytes": first.stat().st_size}, *entries[1:]])
    with pytest.raises(ValueError, match="shard-000000.idx does not belong to shard-000000.tar"):
        ShardedDataset(folder)
    edit_manifest(folder, shards=entries)
    words = np.frombuffer(original, "<u8").copy()
    for at, value, sentence in ((0, 1, "not a shard index"), (1, 9, "version 9, newer"), (4, 1, "header states")):
        changed = words.copy()
        changed[at] = value
        first.write_bytes(changed.tobytes())
        with pytest.raises(ValueError, match=sentence):
            ShardedDataset(folder)
    for at, value in ((8, 512 * 10**6), (8, 511), (9, 1), (10, 5), (-1, 3), (-3, 1 << 40)):
        changed = words.copy()
        changed[at] = value
        first.write_bytes(changed.tobytes())
        with pytest.raises(ValueError, match="contradicts itself"):
            read_index(first)


def test_unigram_statistics(tmp_path):
    dataset = ShardedDataset(write_ids(tmp_path / "set", [[5, 5, 7, EOS]] * 50, vocab_size=10))
    assert corpus_token_counts(dataset).tolist() == [0, 0, 50, 0, 0, 100, 0, 50, 0, 0]
    assert unigram_entropy(dataset) == pytest.approx(1.5 * math.log(2))
