"""Check a data set folder: sizes, sha256, tars against indices, ids against the vocabulary, the tokenizer's fingerprint.

Every fault is printed. Exit status: 0 whole, 1 damaged, 2 nothing that could be checked.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep import cli
from data_prep.encoders import load_tokenizer
from swax_megatron.data.index import read_index
from swax_megatron.data.shards import MANIFEST, ShardedDataset, fingerprint

EPILOG = "example:\n  python data_prep/verify.py data/web"


def data_sets(folder: str | Path) -> list[Path]:
    """The folder itself, or the data sets right inside it; ValueError where there is none."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return [folder]
    inner = sorted(child for child in folder.iterdir() if (child / MANIFEST).is_file()) if folder.is_dir() else []
    if not inner:
        raise ValueError(f"no {MANIFEST} in {folder} or in a folder inside it: not a data set that data_prep/shard.py completed")
    return inner


def faults(folder: Path, progress: cli.Progress | None = None) -> Iterator[str]:
    """Each fault of one data set, as a sentence."""
    try:
        dataset = ShardedDataset(folder, "size", damaged="skip")
    except ValueError as error:
        yield str(error)
        return
    processor = load_tokenizer(dataset.tokenizer_path)
    if (processor.vocab_size(), processor.eos_id()) != (dataset.vocab_size, dataset.eos_id):
        yield f"{dataset.tokenizer_path}: vocabulary or EOS id is not the manifest's"
    yield from dataset.skipped.values()
    totals, entries = dataset.manifest["totals"], dataset.manifest["shards"]
    sums = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")} | {"shards": len(entries)}
    if any(totals[key] != value for key, value in sums.items()):
        yield f"{folder / MANIFEST}: totals are not the sums over the shards"
    for number, (tar, index) in enumerate(dataset.files):
        entry = dataset.shards[number]
        damaged = [file for file, key in ((tar, "sha256"), (index, "index_sha256")) if fingerprint(file) != entry[key]]
        yield from (f"{file}: the sha256 is not the manifest's" for file in damaged)
        try:
            yield from (f"{tar}: {fault}" for fault in _payload_faults(dataset, number))
        except (ValueError, tarfile.TarError) as error:
            yield f"{tar}: {error}"
        if progress:
            progress.add(entry["bytes"], 0, entry["documents"])


def _payload_faults(dataset: ShardedDataset, number: int) -> Iterator[str]:
    """The tar as tarfile reads it against the index, and the ids."""
    tar_path, index_path = dataset.files[number]
    index = read_index(index_path)
    offsets: dict[str, list[int]] = {}
    lengths = []
    with tarfile.open(tar_path, "r:") as tar:
        for member in tar:
            extension = member.name.partition(".")[2]
            offsets.setdefault(extension, []).append(member.offset_data)
            if extension == "lengths":
                lengths.append(np.frombuffer(tar.extractfile(member).read(), "<u4"))
    if offsets.get("ids") != index.members[:, 0].tolist():
        yield "members do not lie where the index says"
        return
    if dataset.has_mask and offsets.get("mask") != index.members[:, 3].tolist():
        yield "loss masks do not lie where the index says"
    if not lengths or not np.array_equal(np.concatenate(lengths), index.lengths):
        yield "document lengths are not the index's"
        return
    ids = np.concatenate(list(dataset.blocks(number)))
    if int(ids.max()) >= dataset.vocab_size:
        yield f"id {int(ids.max())} is outside the vocabulary of {dataset.vocab_size}"
    ends = np.flatnonzero(ids == dataset.eos_id) + 1
    if not np.array_equal(ends, index.starts[1:]):
        yield "EOS does not stand at the end of every document and nowhere else"


def command(args: argparse.Namespace) -> int:
    """Check every data set in the folder."""
    damaged = 0
    for folder in data_sets(args.folder):
        progress = cli.Progress(f"verifying {folder}", sum(path.stat().st_size for path in folder.glob("*.tar")))
        found = list(faults(folder, progress))
        for fault in found:
            print(f"fault: {fault}")
        print(f"{folder}: {'whole' if not found else f'{len(found)} faults'}")
        damaged += bool(found)
    return 1 if damaged else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="a data set folder, or one that holds train and validation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run(command, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
