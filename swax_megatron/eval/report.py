"""Tables and plots from stored results.

    python -m swax_megatron.eval.report evaluations/swax

writes report.md, results.json and the PNG plots beside the units, and TensorBoard scalars (x-axis: context length) with --tensorboard.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swax_megatron.eval import plots
from swax_megatron.eval.units import stored_units, write_json


def results(folder: str | Path) -> dict[str, Any]:
    """Everything stored, without the single answers: the identity, and lists by kind."""
    identity, units = stored_units(folder)
    summary: dict[str, Any] = {"evaluation": identity, "ruler": [], "recall": [], "perplexity": [], "needles": [], "memory": []}
    for unit in units.values():
        summary[unit["kind"]].append({key: value for key, value in unit.items() if key not in ("lines", "kind", "asked")})
    summary["ruler"].sort(key=lambda entry: (entry["task"], entry["length"]))
    return summary


def write_report(folder: str | Path, tensorboard: bool = False) -> Path:
    """report.md, results.json and plots in ``folder``; returns the path of report.md."""
    folder = Path(folder)
    found = results(folder)
    write_json(folder / "results.json", found)
    drawn = plots.draw(found, folder)
    lines = [f"# Evaluation of {found['evaluation']['model']}", ""]
    lines += [f"- {key}: {value}" for key, value in found["evaluation"].items() if key not in ("model", "format_version")]
    for title, body in (
        ("RULER", _ruler(found["ruler"])),
        ("Recall by gap", _recall(found["recall"])),
        ("Loss by position", _loss(found)),
        ("Needles", _needles(found["needles"])),
        ("Memory", _memory(found["memory"])),
    ):
        if body:
            lines += ["", f"## {title}", "", *body]
    lines += ["", *(f"![{path.stem}]({path.name})" for path in drawn)]
    report = folder / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if tensorboard:
        _to_tensorboard(found, folder)
    return report


def _ruler(entries: list[dict]) -> list[str]:
    if not entries:
        return []
    lengths = sorted({entry["length"] for entry in entries})
    scores = {(entry["task"], entry["length"]): entry["score"] for entry in entries}
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    rows = [[task, *(_number(scores.get((task, length))) for length in lengths)] for task in tasks]
    means = [[scores[task, length] for task in tasks if (task, length) in scores] for length in lengths]
    rows.append(["mean of these", *(_number(sum(column) / len(column)) for column in means)])
    counts = sorted({entry["samples"] for entry in entries})
    return [*_table(["task", *map(str, lengths)], rows), "", f"Percent, NVIDIA's scoring; {_span(counts)} samples a cell."]


def _recall(entries: list[dict]) -> list[str]:
    lines: list[str] = []
    for entry in entries:
        rows = [[f"{g['from']}-{g['to'] - 1}", f"{g['accuracy']:.3f}", str(g["queries"])] for g in entry["by_gap"]]
        lines += [f"Rows of {entry['length']} tokens.", "", *_table(["gap", "recalled", "queries"], rows), ""]
    return lines[:-1]


def _loss(found: dict) -> list[str]:
    lines: list[str] = []
    for entry in found["perplexity"]:
        lines += [
            f"{entry['data']}: {entry['documents']} documents, {entry['nats']:.4f} nats a token; "
            f"{entry['share_beyond_window']:.1%} of the tokens have more than a window of in-document past.",
            "",
        ]
        for title in ("by_position", "by_document_length"):
            rows = [[f"{b['from']}-{b['to'] - 1}", f"{b['nats']:.4f}", str(b["tokens"])] for b in entry[title]]
            lines += [*_table([title.replace("_", " "), "nats", "tokens"], rows), ""]
    return lines[:-1]


def _needles(entries: list[dict]) -> list[str]:
    lines: list[str] = []
    for entry in entries:
        rows = [
            [str(g["gap"]), *(f"{g[name]:.3f}" for name in ("nats", "control_nats", "right", "control_right")), str(g["tokens"])]
            for g in entry["by_gap"]
        ]
        head = ["gap", "nats", "nats without needle", "guessed", "guessed without needle", "tokens"]
        told = f"passages of {entry['passage']} tokens in rows of {entry['length']}, scored after the first {entry['cue']}."
        lines += [f"{entry['data']}: {told}", "", *_table(head, rows), ""]
    return lines[:-1]


def _memory(entries: list[dict]) -> list[str]:
    """One line a layer and statistic: the smallest, median and largest head."""
    lines: list[str] = []
    for entry in entries:
        rows = [
            [name, *(f"{value:.4g}" for value in (min(heads), statistics.median(heads), max(heads)))]
            for name, heads in sorted(entry["heads"].items())
        ]
        lines += [f"{entry['data']}: {entry['documents']} documents of up to {entry['length']} tokens.", ""]
        lines += [*_table(["statistic", "smallest head", "median", "largest head"], rows), ""]
    return lines[:-1]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _to_tensorboard(found: dict, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for entry in found["ruler"]:
            writer.add_scalar(f"ruler/{entry['task']}", entry["score"], entry["length"])
        for entry in found["recall"]:
            for gap in entry["by_gap"]:
                writer.add_scalar(f"recall/length_{entry['length']}", gap["accuracy"], gap["from"])
        for entry in found["perplexity"]:
            for name in ("by_position", "by_document_length"):
                for bucket in entry[name]:
                    writer.add_scalar(f"loss/{name}", bucket["nats"], bucket["from"])
        for entry in found["needles"]:
            for gap in entry["by_gap"]:
                writer.add_scalar("needles/nats_saved", gap["control_nats"] - gap["nats"], gap["gap"])
                writer.add_scalar("needles/guessed", gap["right"], gap["gap"])
        for entry in found["memory"]:
            for name, heads in entry["heads"].items():
                writer.add_histogram(name, np.array(heads), 0)
                writer.add_scalar(name, statistics.median(heads), 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the --out folder of python -m swax_megatron.eval")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard scalars")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.folder, arguments.tensorboard))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
