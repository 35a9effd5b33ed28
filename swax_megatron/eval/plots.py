"""PNG plots of an evaluation: score by length, recall by gap, loss by position, loss saved by needles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what ``report.results`` found; returns the files written. Raises ValueError where matplotlib is missing."""
    drawn = []
    if found["ruler"]:
        tasks = dict.fromkeys(entry["task"] for entry in found["ruler"])
        lines = [(task, [(e["length"], e["score"]) for e in found["ruler"] if e["task"] == task]) for task in tasks]
        drawn.append(line_plot(folder / "ruler.png", lines, "context length (tokens)", "RULER score (%)", (0, 100)))
    if found["recall"]:
        lines = [(f"rows of {e['length']}", [(g["from"], g["accuracy"]) for g in e["by_gap"]]) for e in found["recall"]]
        drawn.append(line_plot(folder / "recall.png", lines, "gap (tokens)", "share recalled", (0, 1)))
    if found["perplexity"]:
        lines = [(Path(e["data"]).name, [(max(1, b["from"]), b["nats"]) for b in e["by_position"]]) for e in found["perplexity"]]
        drawn.append(line_plot(folder / "loss_by_position.png", lines, "position in the document (tokens)", "loss (nats)"))
    if found["needles"]:
        lines = [(Path(e["data"]).name, [(g["gap"], g["control_nats"] - g["nats"]) for g in e["by_gap"]]) for e in found["needles"]]
        drawn.append(line_plot(folder / "needles.png", lines, "gap (tokens)", "loss saved by the needle (nats)"))
    return drawn


def line_plot(
    path: Path,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    *,
    log_x: bool = True,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
) -> Path:
    """Named lines of (x, y) points in one plot, written to ``path``; bands: of every line, (x, lowest, highest)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'swax_megatron[eval]'") from error
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(lines):
        ordered = sorted(points)
        (drawn,) = axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker="o", markersize=3, label=name)
        if bands:
            xs, lowest, highest = zip(*sorted(bands[index]), strict=True)
            axes.fill_between(xs, lowest, highest, color=drawn.get_color(), alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if y_range is not None:
        margin = 0.02 * (y_range[1] - y_range[0])
        axes.set_ylim(y_range[0] - margin, y_range[1] + margin)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path)
    return path
