"""From the finished segments of a whole corpus to its data sets: duplicates found, shards joined and numbered, manifests, one rename."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cli import Progress
from data_prep.duplicates import FINGERPRINT, FINGERPRINTS, find_duplicates
from data_prep.encoders import load_tokenizer
from data_prep.encoding import SKIPPED, SPLITS, EncodeOptions
from data_prep.inputs import Source
from data_prep.joining import Group, Piece, groups, place_shards
from data_prep.pool import Pool
from data_prep.segments import Segment, Task
from data_prep.workfolder import PUBLISHED, WorkFolder
from swax_megatron.data.shards import MANIFEST, fingerprint
from swax_megatron.data.writer import id_dtype, sync, write_manifest, write_synced


@dataclass
class Split:
    """The pieces of one data set in order, and what each source gave to it."""

    pieces: list[Piece] = field(default_factory=list)
    text_bytes: dict[int, int] = field(default_factory=dict)


def require_all(work: WorkFolder, tasks: Sequence[Task]) -> list[tuple[Segment, dict[str, Any]]]:
    """The finished segments of the corpus in order; ValueError where one is missing."""
    work.refresh()
    found, missing = [], 0
    for task in tasks:
        done, lacking = work.finished(task)
        found += done
        missing += len(lacking)
    if missing:
        raise ValueError(
            f"{work.path} lacks at least {missing} of {len(found) + missing} segments: "
            "run the parts that did not finish again, then --merge"
        )
    return found


def assemble(
    work: WorkFolder, tasks: Sequence[Task], sources: Sequence[Source], options: EncodeOptions, pool: Pool, notes: dict[str, Any]
) -> str:
    """Write the data sets aside, complete, and rename them to ``work.out``; returns a summary.

    notes: for the manifest. ValueError where a data set would be empty.
    """
    segments = require_all(work, tasks)
    processor = load_tokenizer(options.tokenizer)
    vocab_size = processor.vocab_size()
    special = {"unk_id": processor.unk_id(), "bos_id": processor.bos_id(), "eos_id": processor.eos_id()}
    skipped = {reason: sum(record["skipped"].get(reason, 0) for _, record in segments) for reason in SKIPPED}
    splits = {split: _split(work, segments, split, options) for split in (SPLITS if options.validation_fraction else SPLITS[:1])}
    skipped["duplicate"] = sum(piece.dropped for split in splits.values() for piece in split.pieces)
    try:
        _refuse_empty(splits, skipped, options.validation_fraction)
    except ValueError:
        work.remove()  # no other run can make use of it
        raise
    result = work.path / "result"
    shutil.rmtree(result, ignore_errors=True)
    counts = []
    for name, split in splits.items():
        folder = result / name if options.validation_fraction else result
        folder.mkdir(parents=True)
        made = list(groups(split.pieces, vocab_size, options.shard_size))
        joined = _join([group for group in made if not group.as_it_is], pool, name)
        shards = [
            (Path(group.pieces[0].folder), group.pieces[0].entry) if group.as_it_is else (work.joined / group.name, joined[group.name])
            for group in made
        ]
        entries = place_shards(shards, folder)
        said = {**notes, "options": {"split": name, **notes["options"]}, "skipped": skipped}
        said["sources"] = _sources(sources, tasks, split, id_dtype(vocab_size).itemsize)
        text_bytes = sum(split.text_bytes.values())
        manifest = write_manifest(folder, entries, text_bytes, options.tokenizer, vocab_size, special, **said)
        counts.append(f"{name} {manifest['totals']['documents']} documents, {manifest['totals']['tokens']} tokens")
    left_out = [f"{count} {reason.replace('_', ' ')}" for reason, count in skipped.items() if count]
    summary = "; ".join(counts) + (f"; skipped {', '.join(left_out)}" if left_out else "")
    _publish(work, result, {"summary": summary, **_made_by(work, tasks)})
    return summary


def _join(todo: list[Group], pool: Pool, split: str) -> dict[str, dict[str, Any]]:
    """``Pool.join`` with a line of progress every few seconds."""
    if not todo:
        return {}
    progress = Progress(f"joining small shards of {split}", sum(group.documents for group in todo))
    joined = pool.join(todo, lambda entry: progress.add(entry["documents"], 0, entry["documents"]))
    progress.finish()
    return joined


def _split(work: WorkFolder, segments: Sequence[tuple[Segment, dict[str, Any]]], name: str, options: EncodeOptions) -> Split:
    """The pieces of a split, duplicates marked."""
    mine = [(segment, record["splits"][name]) for segment, record in segments if name in record["splits"]]
    folders = [work.folder(segment) / name for segment, _ in mine]
    repeats = work.path / "repeats" / name
    if options.deduplicate:
        documents = sum(entry["documents"] for _, content in mine for entry in content["shards"])
        progress = Progress(f"finding duplicates in {name}", 2 * documents)
        find_duplicates([folder / FINGERPRINTS for folder in folders], repeats, report=lambda count: progress.add(count, 0, 0))
        progress.finish()
    split = Split()
    for number, ((segment, content), folder) in enumerate(zip(mine, folders, strict=True)):
        source, text_bytes = segment.task.source, content["text_bytes"]
        again = np.empty(0, np.int64)
        if options.deduplicate and (repeats / str(number)).exists():
            again = np.sort(np.fromfile(repeats / str(number), "<i8"))
            text_bytes -= int(np.fromfile(folder / FINGERPRINTS, FINGERPRINT)["bytes"][again].sum())
        first = 0
        for shard, entry in enumerate(content["shards"]):
            last = first + entry["documents"]
            dropped = int(np.searchsorted(again, last) - np.searchsorted(again, first))
            split.pieces.append(Piece(str(folder), entry, segment.key, source, shard, first, str(repeats / str(number)), dropped))
            first = last
        split.text_bytes[source] = split.text_bytes.get(source, 0) + text_bytes
    return split


def _sources(sources: Sequence[Source], tasks: Sequence[Task], split: Split, item_size: int) -> list[dict[str, Any]]:
    """What each source is, what was read of it, and what it gave to this split."""
    found = []
    for number, source in enumerate(sources):
        files = [item for task in tasks if task.source == number for item in task.inputs]
        kept = [piece.kept(item_size) for piece in split.pieces if piece.source == number]
        found.append(
            {
                "name": source.name,
                "path": source.paths[0] if len(source.paths) == 1 else list(source.paths),
                "files": len(files),
                "bytes": sum(item.bytes or 0 for item in files),
                "documents": sum(documents for documents, _, _ in kept),
                "tokens": sum(tokens for _, tokens, _ in kept),
                "text_bytes": split.text_bytes.get(number, 0),
                **({"notes": source.notes} if source.notes else {}),
            }
        )
    return found


def _refuse_empty(splits: dict[str, Split], skipped: dict[str, int], fraction: float) -> None:
    documents = {name: sum(piece.entry["documents"] - piece.dropped for piece in split.pieces) for name, split in splits.items()}
    total = sum(documents.values())
    if not total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
        raise ValueError(f"the input holds no document (skipped: {reasons or 'none'})")
    for name, count in documents.items():
        if not count:
            raise ValueError(f"--validation-fraction {fraction} of {total} documents leaves the {name} set empty; choose another fraction")


def _publish(work: WorkFolder, result: Path, said: dict[str, Any]) -> None:
    """Rename the finished folder to its name; an old one leaves first, and goes with the work folder."""
    write_synced(work.path / PUBLISHED, json.dumps({**said, "manifests": _manifests(result)}).encode())
    if work.out.exists():
        shutil.rmtree(work.path / "replaced", ignore_errors=True)
        work.out.rename(work.path / "replaced")
    result.rename(work.out)
    sync(work.out.parent)
    work.remove()


def published(work: WorkFolder, tasks: Sequence[Task]) -> str | None:
    """The summary of a run of this command that was interrupted after its data set got its name, or None.

    What such a run left, of this or another command or over other files, is removed.
    """
    if not (work.path / PUBLISHED).exists():
        return None
    said = json.loads((work.path / PUBLISHED).read_text())
    if said["manifests"] != _manifests(work.out):
        return None  # it was interrupted before
    work.remove()
    made_by = _made_by(work, tasks)
    return said["summary"] if {key: said.get(key) for key in made_by} == made_by else None


def _made_by(work: WorkFolder, tasks: Sequence[Task]) -> dict[str, str]:
    """What tells one run's data set from another's: the options, and the files with their sizes and times."""
    files = json.dumps([asdict(task) for task in tasks])
    return {"command": work.command, "files": hashlib.sha256(files.encode()).hexdigest()}


def _manifests(folder: Path) -> dict[str, str]:
    """The sha256 of every manifest below a folder, which names its content."""
    return {str(path.relative_to(folder)): fingerprint(path) for path in sorted(folder.rglob(MANIFEST))}
