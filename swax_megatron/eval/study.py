"""The report of an experiment from its stored units: tables with the range over the seeds, plots, and what the figures say.

    python -m swax_megatron.eval.study benchmarks/results/effect

writes report.md and the plots beside the units. A unit is one (arm, seed), a JSON file of scripts/reproduce_effect.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from swax_megatron.eval.plots import line_plot
from swax_megatron.eval.units import read_json

Values = dict[str, dict[Any, list[float]]]  # arm -> x -> one value a seed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.eval.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the --results of scripts/reproduce_effect.py")
    try:
        print(write_report(parser.parse_args(argv).folder))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(folder: Path) -> Path:
    """report.md and plots in ``folder``; returns the path of report.md. Raises ValueError where nothing is stored."""
    units = [read_json(path) for path in sorted(folder.glob("*-*.json"))]
    if not units:
        raise ValueError(f"{folder} holds no unit yet; scripts/reproduce_effect.py writes them")
    lines = ["# Results", "", *_setting(units)]
    for window in sorted({window for unit in units for window in unit["tests"]}, key=int):
        lines += _recall(folder, units, window) + _perplexity(folder, units, window)
        lines += _needles(folder, units, window) + _ruler(folder, units, window)
    lines += _curves(folder, units)
    report = folder / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report


def collect(units: Iterable[dict], found: Callable[[dict], Iterable[tuple[Any, float]]]) -> Values:
    """arm -> x -> one value a seed, from the (x, value) pairs that ``found`` gives for a unit."""
    values: Values = {}
    for unit in units:
        for x, value in found(unit):
            values.setdefault(unit["arm"], {}).setdefault(x, []).append(value)
    return values


def _setting(units: list[dict]) -> list[str]:
    rows = []
    for arm in dict.fromkeys(unit["arm"] for unit in units):
        mine = [unit for unit in units if unit["arm"] == arm]
        first, window = mine[0], mine[0]["config"]["window"]
        shown = f"{window['schedule']} {window['windows']}, anneal {window['anneal_fraction']:g}"
        seconds = statistics.median(unit["seconds"]["train"] for unit in mine)
        loss = _spread([unit["loss"][-1][1] for unit in mine])
        rows.append([arm, str(len(mine)), first["config"]["model"]["pattern"], shown if "S" in first["config"]["model"]["pattern"] else "",
                     f"{first['parameters']:,}", str(first["config"]["train"]["steps"]), loss, f"{seconds:.0f}"])  # fmt: skip
    head = ["arm", "seeds", "pattern", "windows", "parameters", "steps", "last training loss", "seconds a unit"]
    devices = ", ".join(sorted({unit["device"] for unit in units}))
    task = units[0]["rows"]
    told = [f"Rows: {', '.join(f'{name} {value}' for name, value in task.items())}.", ""] if task else []
    return [f"Device: {devices}; units ran side by side.", "", *told, *_table(head, rows)]


def _recall(folder: Path, units: list[dict], window: str) -> list[str]:
    lines: list[str] = []
    entries = [entry for unit in units for entry in unit["tests"].get(window, {}).get("recall", [])]
    for length in sorted({entry["length"] for entry in entries}):

        def found(unit: dict, length: int = length) -> Iterable[tuple[Any, float]]:
            for entry in unit["tests"].get(window, {}).get("recall", []):
                if entry["length"] == length:
                    yield from (((gap["from"], gap["to"]), gap["accuracy"]) for gap in entry["by_gap"])

        values = collect(units, found)
        title = f"Recall by gap: rows of {length} tokens, test window {window}"
        name = f"recall_{length}_window_{window}.png"
        by_gap = {arm: {gap[0]: v for gap, v in by.items()} for arm, by in values.items()}
        plot = _plot(folder / name, by_gap, "gap (tokens)", "share recalled", (0, 1))
        lines += ["", f"## {title}", "", *_by_x(values, "arm (seeds)", lambda gap: f"{gap[0]}-{gap[1] - 1}"), "", plot]
    return lines


def _perplexity(folder: Path, units: list[dict], window: str) -> list[str]:
    def found(unit: dict) -> Iterable[tuple[Any, float]]:
        for entry in unit["tests"].get(window, {}).get("perplexity", []):
            yield ("all", "all"), entry["nats"]
            yield from (((bucket["from"], bucket["to"]), bucket["nats"]) for bucket in entry["by_position"])

    values = collect(units, found)
    if not values:
        return []
    by_position = {arm: {max(1, x[0]): v for x, v in by.items() if x[0] != "all"} for arm, by in values.items()}
    plot = _plot(folder / f"loss_window_{window}.png", by_position, "position in the document (tokens)", "loss (nats)")
    beyond = {e["share_beyond_window"] for unit in units for e in unit["tests"].get(window, {}).get("perplexity", [])}
    table = _by_x(values, "arm (seeds)", lambda x: x[0] if x[0] == "all" else f"{x[0]}-{x[1] - 1}")
    shares = ", ".join(f"{share:.1%}" for share in sorted(beyond))
    told = f"Tokens with more than {window} tokens of in-document past: {shares} of those tested."
    return ["", f"## Loss by position (nats a token), test window {window}", "", told, "", *table, "", plot]


def _needles(folder: Path, units: list[dict], window: str) -> list[str]:
    lines: list[str] = []
    measures: list[tuple[str, str, Callable[[dict], float]]] = [
        ("saved", "loss saved by the needle (nats)", lambda gap: gap["control_nats"] - gap["nats"]),
        ("guessed", "share of the needle guessed", lambda gap: gap["right"]),
    ]
    for name, title, measure in measures:

        def found(unit: dict, measure: Callable[[dict], float] = measure) -> Iterable[tuple[Any, float]]:
            for entry in unit["tests"].get(window, {}).get("needles", []):
                yield from ((gap["gap"], measure(gap)) for gap in entry["by_gap"])

        if values := collect(units, found):
            plot = _plot(folder / f"needles_{name}_window_{window}.png", values, "gap (tokens)", title)
            lines += ["", f"## Needles: {title}, test window {window}", "", *_by_x(values, "arm (seeds)", str), "", plot]
    return lines


def _ruler(folder: Path, units: list[dict], window: str) -> list[str]:
    lines: list[str] = []
    entries = [entry for unit in units for entry in unit["tests"].get(window, {}).get("ruler", [])]
    for task in dict.fromkeys(entry["task"] for entry in entries):

        def found(unit: dict, task: str = task) -> Iterable[tuple[Any, float]]:
            mine = unit["tests"].get(window, {}).get("ruler", [])
            return ((entry["length"], entry["score"]) for entry in mine if entry["task"] == task)

        values = collect(units, found)
        plot = _plot(folder / f"{task}_window_{window}.png", values, "context length (tokens)", "score (%)", (0, 100))
        lines += ["", f"## RULER {task} (%), test window {window}", "", *_by_x(values, "arm (seeds)", str), "", plot]
    return lines


def _curves(folder: Path, units: list[dict]) -> list[str]:
    """Recall over the training steps, at each arm's own test window, of every range of gaps."""
    lines: list[str] = []
    first = f"recall/window_{units[0]['test_window']}/gap_"
    gaps = sorted({name.removeprefix(first) for unit in units for line in unit["curves"] for name in line if name.startswith(first)})
    for gap in gaps:

        def found(unit: dict, gap: str = gap) -> Iterable[tuple[Any, float]]:
            name = f"recall/window_{unit['test_window']}/gap_{gap}"
            return ((line["step"], line[name]) for line in unit["curves"] if name in line)

        title = f"share recalled, gaps from {int(gap)} tokens"
        lines.append(_plot(folder / f"training_gap_{int(gap)}.png", collect(units, found), "training step", title, (0, 1), log_x=False))
    return ["", "## Recall over the training steps, at each arm's own test window", "", *lines] if lines else []


def _plot(path: Path, values: Values, x_label: str, y_label: str, y_range: tuple[float, float] | None = None, *, log_x: bool = True) -> str:
    curves = [(arm, [(x, statistics.fmean(v)) for x, v in by.items()]) for arm, by in values.items()]
    bands = [[(x, min(v), max(v)) for x, v in by.items()] for by in values.values()]
    line_plot(path, curves, x_label, y_label, y_range, log_x=log_x, bands=bands)
    return f"![{path.stem}]({path.name})"


def _by_x(values: Values, corner: str, name: Callable[[Any], str]) -> list[str]:
    places = list(dict.fromkeys(x for by in values.values() for x in by))
    body = [[f"{arm} ({max(map(len, by.values()))})", *(_spread(by.get(x, [])) for x in places)] for arm, by in values.items()]
    return _table([corner, *map(name, places)], body)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = 1 if max(values) > 10 else 3
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    sys.exit(main())
