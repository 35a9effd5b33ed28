"""Report of a run over all its restarts: where the time went, what happened, loss and step time by window.

Reads ``events.jsonl`` and ``metrics.jsonl`` of a run directory, running or ended, and changes nothing but the folder of the plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from swax_megatron.errors import ExitCode
from swax_megatron.resilience.events import read_events
from swax_megatron.resilience.goodput import KINDS, Account, Attempt, account

EPILOG = """\
examples:
  python -m swax_megatron.report runs/quickstart
  python -m swax_megatron.report runs/quickstart --out plots --no-plots
"""
TOLD = ("skip", "rewind", "hang", "straggler", "signal")


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The steps of metrics.jsonl; half a line that a killed run left is left out."""
    path, lines = run_dir / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if "step" in line]


def text(run_dir: Path, found: Account, events: list[dict[str, Any]], metrics: list[dict[str, float]]) -> str:
    """The report as text."""
    steps = f"{int(metrics[-1]['step']) + 1} steps, loss {metrics[-1]['loss/train']:.4f}" if metrics else "no step yet"
    lines = [f"{run_dir}: {steps}; {len(found.attempts)} start(s), {duration(found.wall)} from the first to the last sign of life", ""]
    lines += [f"goodput {found.fraction:.1%}"]
    lines += [f"  {kind:<11} {duration(found.seconds[kind]):>10}  {share(found.seconds[kind], found.wall)}" for kind in KINDS]
    lines += ["", "start  at                    steps            took     restart        lost  end"]
    lines += [_line(attempt) for attempt in found.attempts]
    counts = {kind: sum(event["event"] == kind for event in events) for kind in TOLD}
    if any(counts.values()):
        lines += ["", "events: " + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)]
        lines += ["  " + _event(event) for event in events if event["event"] in TOLD][-20:]
    if metrics:
        lines += ["", "window     steps   s/step (median)   loss (last)"]
        lines += [
            f"{window:<10g} {len(group):>5}   {median(line['time/step'] for line in group):>15.4g}   {group[-1]['loss/train']:>11.4f}"
            for window, group in by_window(metrics).items()
        ]
    return "\n".join(lines)


def by_window(metrics: list[dict[str, float]]) -> dict[float, list[dict[str, float]]]:
    """Steps by their (mean) attention window: neither loss nor time of different windows can be compared."""
    groups: dict[float, list[dict[str, float]]] = {}
    for line in metrics:
        groups.setdefault(line["window/size"], []).append(line)
    return dict(sorted(groups.items()))


def plot(folder: Path, found: Account, metrics: list[dict[str, float]]) -> list[Path]:
    """goodput.png, loss.png and step_time.png; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)
        written.append(folder / name)

    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.35 * max(4, min(40, len(found.attempts)))))
    shown = found.attempts[-40:]
    left = [0.0] * len(shown)
    for kind in KINDS:
        seconds = [attempt.seconds[kind] for attempt in shown]
        axes.barh([str(attempt.number) for attempt in shown], seconds, left=left, label=kind)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds", ylabel="start", title=f"goodput {found.fraction:.1%} of {duration(found.wall)}")
    axes.legend(ncols=4, fontsize="small")
    save(figure, "goodput.png")
    for name, label, file in (("loss/train", "loss", "loss.png"), ("time/step", "seconds a step", "step_time.png")):
        figure, axes = pyplot.subplots(figsize=(9, 4.5))
        for window, group in by_window(metrics).items():
            axes.plot([line["step"] for line in group], [line[name] for line in group], ".", markersize=3, label=f"window {window:g}")
        for attempt in found.attempts[1:]:
            if attempt.first_step is not None:
                axes.axvline(attempt.first_step, color="grey", linewidth=0.5)
        axes.set(xlabel="step (grey: restarts)", ylabel=label)
        if metrics:
            axes.legend(fontsize="small")
        save(figure, file)
    return written


def duration(seconds: float) -> str:
    """1 d 02:03:04, 02:03:04, or 3.2 s below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours:02}:{minutes:02}:{rest:02}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:6.1%}" if whole else "     -"


def _line(attempt: Attempt) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.began))
    first, last = (str(step) if step is not None else "-" for step in (attempt.first_step, attempt.last_step))
    seconds = attempt.seconds
    codes = {int(code): code.name.lower().replace("_", " ") for code in ExitCode}
    end = "no word (killed, or running)" if attempt.code is None else f"{attempt.code} {codes.get(attempt.code, '')}"
    took = sum(seconds.values())
    return (
        f"{attempt.number:>5}  {at}  {first + ' to ' + last:<13} {duration(took):>9} {duration(seconds['restart']):>11} "
        f"{duration(seconds['lost']):>11}  {end}"
    )


def _event(event: dict[str, Any]) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "attempt")}
    return f"{at} {event['event']}: " + ", ".join(f"{key} {value}" for key, value in rest.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.report", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="folder of report.txt and the plots (default: RUN/report)")
    parser.add_argument("--no-plots", action="store_true", help="text alone, written nowhere")
    arguments = parser.parse_args(argv)
    events = list(read_events(arguments.run))
    if not events:
        print(f"error: {arguments.run} holds no events.jsonl: give the run directory of a run that was started", file=sys.stderr)
        return ExitCode.USER_ERROR
    found, metrics = account(events), read_metrics(arguments.run)
    report = text(arguments.run, found, events, metrics)
    print(report)
    if arguments.no_plots:
        return ExitCode.FINISHED
    folder = arguments.out or arguments.run / "report"
    try:
        written = plot(folder, found, metrics)
    except OSError as error:
        print(f"error: {folder} cannot be written ({error.strerror}): name another folder with --out", file=sys.stderr)
        return ExitCode.USER_ERROR
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    print("\nwrote " + ", ".join(str(path) for path in [folder / "report.txt", *written]))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
