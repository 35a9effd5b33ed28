"""Put runs side by side: what differs in their configurations, loss curves, windows, throughput, and every evaluation they have.

    python -m swax_megatron.eval.compare runs/w128 runs/w2048 runs/stochastic --out comparisons/windows

A run is a run directory (config.yaml and metrics.jsonl). Its evaluation is what ``python -m swax_megatron.eval RUN --out
RUN/evaluation`` stored; --evaluation names another folder of the runs. Written: compare.md, compare.json and PNG plots.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swax_megatron.config import load_config, to_dict
from swax_megatron.eval.plots import line_plot
from swax_megatron.eval.report import results
from swax_megatron.eval.units import write_json
from swax_megatron.report import read_metrics

IGNORED = ("run_dir", "monitor.", "checkpoint.", "resilience.", "train.threads")  # they do not shape what is learnt
SMOOTH = 20  # steps of the loss curve's moving mean


@dataclass(frozen=True)
class Run:
    """config: dotted field -> value; steps: lines of metrics.jsonl in order; evaluation: ``report.results``, or None."""

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


def read_run(path: str | Path, evaluation: str = "evaluation") -> Run:
    """evaluation: the folder of the run that holds its evaluation. Raises ValueError where ``path`` is no run that has done a step."""
    folder = Path(path)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no run directory with steps done: {name} is missing")
    steps = read_metrics(folder)
    if not steps:
        raise ValueError(f"{folder}/metrics.jsonl holds no step; compare runs that have trained")
    stored = folder / evaluation
    found = results(stored) if (stored / "evaluation.json").exists() else None
    return Run(folder.name, _flat(to_dict(load_config(folder / "config.yaml"))), steps, found)


def check_comparable(runs: Sequence[Run]) -> None:
    """Losses mean the same only over the same tokens: refuse runs with other vocabularies, validation sets or tested documents."""
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"runs share a name ({', '.join(run.name for run in runs)}): give folders with different last parts")
    first = runs[0]
    for run in runs[1:]:
        for field in ("model.vocab_size", "data.validation"):
            if run.config[field] != first.config[field]:
                raise ValueError(
                    f"{run.name} and {first.name} cannot be compared: {field} differs ({run.config[field]!r} and {first.config[field]!r})"
                )
    tested = [(run.name, [b["tokens"] for e in run.evaluation["perplexity"] for b in e["by_position"]]) for run in runs if run.evaluation]
    tested = [(name, tokens) for name, tokens in tested if tokens]
    for name, tokens in tested[1:]:
        if tokens != tested[0][1]:
            raise ValueError(
                f"{name} and {tested[0][0]} cannot be compared: their losses by position are of other documents "
                f"({sum(tokens):,} and {sum(tested[0][1]):,} tokens); evaluate both with the same --data, --documents and --position-length"
            )


def compare(paths: Sequence[str | Path], out: str | Path, evaluation: str = "evaluation") -> Path:
    """Write the comparison into ``out``; returns the path of compare.md."""
    runs = [read_run(path, evaluation) for path in paths]
    if evaluation != "evaluation" and not any(run.evaluation for run in runs):
        raise ValueError(f"--evaluation {evaluation}: none of the runs has a folder of this name with an evaluation in it")
    check_comparable(runs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    fields = [name for name in runs[0].config if not name.startswith(IGNORED) and len({repr(run.config.get(name)) for run in runs}) > 1]
    differences = [[name, *(str(run.config.get(name)) for run in runs)] for name in fields]
    summary = [[title, *(_shown(function(run)) for run in runs)] for title, function in _SUMMARY]
    head = ["", *(run.name for run in runs)]
    lines = ["# Runs side by side", "", "## Configuration", "", *(_table(head, differences) if fields else ["No difference."])]
    lines += ["", "## Training", "", *_table(head, summary)]
    evaluations = _evaluations(runs)
    for title, rows in evaluations.items():
        lines += ["", f"## {title}", "", *_table(["", *(run.name for run in runs if run.evaluation)], rows)]
    plots = _draw(runs, out)
    lines += ["", *(f"![{path.stem}]({path.name})" for path in plots)]
    content = {"runs": [str(path) for path in paths], "configuration": differences, "training": summary, "evaluation": evaluations}
    write_json(out / "compare.json", content)
    (out / "compare.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out / "compare.md"


def _last(name: str, count: int = SMOOTH):
    def value(run: Run) -> float | None:
        found = [step[name] for step in run.steps if name in step]
        return statistics.fmean(found[-count:]) if found else None

    return value


def _median_speed(run: Run) -> float | None:
    found = [step["throughput/tokens_per_second_per_device"] for step in run.steps if "throughput/tokens_per_second_per_device" in step]
    return statistics.median(found) if found else None


_SUMMARY = (
    ("steps", lambda run: run.steps[-1]["step"] + 1),
    ("tokens seen", lambda run: run.steps[-1].get("data/tokens_seen")),
    (f"training loss, mean of the last {SMOOTH}", _last("loss/train")),
    ("validation loss, last", _last("loss/validation", 1)),
    ("mean window", lambda run: statistics.fmean(step["window/size"] for step in run.steps if "window/size" in step)),
    ("tokens/s a device, median", _median_speed),
)


Values = dict[Any, float]  # what an evaluation found, by what it is of
_EVALUATIONS: tuple[tuple[str, Callable[[dict], Values], Callable[[Any], str]], ...] = (
    ("RULER (%)", lambda found: {(e["task"], e["length"]): e["score"] for e in found["ruler"]}, lambda key: f"{key[0]} at {key[1]}"),
    (
        "Share recalled, by gap",
        lambda found: {(e["length"], g["from"], g["to"]): g["accuracy"] for e in found["recall"] for g in e["by_gap"]},
        lambda key: f"{key[1]}-{key[2] - 1} of {key[0]}",
    ),
    (
        "Loss by position (nats)",
        lambda found: {(b["from"], b["to"]): b["nats"] for e in found["perplexity"] for b in e["by_position"]},
        lambda key: f"{key[0]}-{key[1] - 1}",
    ),
    (
        "Loss saved by a needle, by gap (nats)",
        lambda found: {(e["length"], g["gap"]): g["control_nats"] - g["nats"] for e in found["needles"] for g in e["by_gap"]},
        lambda key: f"{key[1]} of {key[0]}",
    ),
    (
        "Memory and attention, median head",
        lambda found: {name: statistics.median(heads) for e in found["memory"] for name, heads in e["heads"].items()},
        str,
    ),
)


def _evaluations(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """Rows of a table by its title, a column for each run that was evaluated; only of what some run has."""
    evaluated = [run.evaluation for run in runs if run.evaluation]
    if not evaluated:
        return {}
    tables = {"Evaluation": [[name, *(str(e["evaluation"].get(name, "")) for e in evaluated)] for name in ("window", "dtype")]}
    for title, values, name in _EVALUATIONS:
        found = [values(one) for one in evaluated]
        keys = sorted({key for one in found for key in one})
        if keys:
            tables[title] = [[name(key), *(_shown(one.get(key)) for one in found)] for key in keys]
    return tables


def _draw(runs: Sequence[Run], out: Path) -> list[Path]:
    curves = [(run.name, _smooth([(s["step"], s["loss/train"]) for s in run.steps])) for run in runs]
    windows = [(run.name, [(s["step"], s["window/size"]) for s in run.steps if "window/size" in s]) for run in runs]
    drawn = [
        line_plot(out / "loss.png", curves, "step", f"training loss (nats, mean of {SMOOTH})", log_x=False),
        line_plot(out / "windows.png", windows, "step", "attention window (tokens)", log_x=False),
    ]
    validation = [(run.name, [(s["step"], s["loss/validation"]) for s in run.steps if "loss/validation" in s]) for run in runs]
    if any(points for _, points in validation):
        drawn.append(line_plot(out / "validation.png", validation, "step", "validation loss (nats)", log_x=False))
    evaluated = [run for run in runs if run.evaluation]
    ruler = [(run.name, _mean_by(run.evaluation["ruler"], "length", "score")) for run in evaluated]
    recall = [(r.name, [(g["from"], g["accuracy"]) for e in r.evaluation["recall"][:1] for g in e["by_gap"]]) for r in evaluated]
    position = [
        (r.name, [(max(1, b["from"]), b["nats"]) for e in r.evaluation["perplexity"][:1] for b in e["by_position"]]) for r in evaluated
    ]
    for name, lines, x_label, y_label in (
        ("ruler.png", ruler, "context length (tokens)", "mean RULER score (%)"),
        ("recall.png", recall, "gap (tokens)", "share recalled"),
        ("loss_by_position.png", position, "position in the document (tokens)", "loss (nats)"),
    ):
        if any(points for _, points in lines):
            drawn.append(line_plot(out / name, lines, x_label, y_label))
    return drawn


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, statistics.fmean(y for _, y in points[max(0, i - SMOOTH + 1) : i + 1])) for i, (step, _) in enumerate(points)]


def _mean_by(entries: list[dict], key: str, value: str) -> list[tuple[float, float]]:
    return [(x, statistics.fmean(e[value] for e in entries if e[key] == x)) for x in sorted({e[key] for e in entries})]


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", required=True, help="folder for the table and the plots")
    parser.add_argument(
        "--evaluation", default="evaluation", metavar="NAME", help="folder of every run that holds its evaluation (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        if len(arguments.runs) < 2:
            raise ValueError("give at least two runs to compare")
        print(compare(arguments.runs, arguments.out, arguments.evaluation))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
