"""The experiment on attention windows: does a short or a stochastic window teach the memory what a large one lets it ignore?

Every (arm, seed) is one unit: trained through launcher.run, tested by gap at both windows and at longer rows, and kept as
one file of --results. A unit that was cut off is done again from the start; units add up over as many calls as it takes.
The report (table with the spread over seeds, plots) is made from the stored units.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from swax_megatron.config import load_config
from swax_megatron.eval.plots import line_plot
from swax_megatron.eval.units import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
BASE, ARMS = ROOT / "configs/recall/base.yaml", ROOT / "configs/recall/arms.yaml"
EPILOG = """\
examples:
  python scripts/reproduce_effect.py --seeds 1,2,3                        # everything that is not stored yet, then the report
  python scripts/reproduce_effect.py --arms small,large --minutes 9       # starts no unit that would end after nine minutes
  python scripts/reproduce_effect.py --report                             # the report of what is stored
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", help="comma-separated (default: all of configs/recall/arms.yaml)")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated (default 1,2,3)")
    parser.add_argument("--data", type=Path, default=Path("data/recall"), help="rows; written where missing (default data/recall)")
    parser.add_argument("--work", type=Path, default=Path("runs/effect"), help="run directories (default runs/effect)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/effect"), help="stored units and the report")
    parser.add_argument("--test-lengths", default="1024,2048,4096", help="row lengths of the test (default 1024,2048,4096)")
    parser.add_argument("--test-rows", type=int, default=64, help="test rows of each range of gaps (default 64)")
    parser.add_argument("--minutes", type=float, help="start no unit that would end later than this, judged by the longest so far")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", help="overrides of every arm, e.g. train.steps=50")
    parser.add_argument("--row-options", default="", help='options of data_prep/recall_rows.py, e.g. "--rows 2000 --length 128"')
    options = parser.parse_args(argv)
    try:
        if not options.report:
            run_units(options)
        print(write_report(options.results))
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def run_units(options: argparse.Namespace) -> None:
    """Train and test every unit that is not stored."""
    arms = yaml.safe_load(ARMS.read_text(encoding="utf-8"))
    chosen = options.arms.split(",") if options.arms else list(arms)
    if unknown := [arm for arm in chosen if arm not in arms]:
        raise ValueError(f"--arms {','.join(unknown)}: not in {ARMS.name}; it has {', '.join(arms)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = _need_data(options)
    started, longest = time.monotonic(), 0.0
    for seed in seeds:
        for arm in chosen:
            stored = options.results / f"{arm}-{seed}.json"
            if stored.exists():
                continue
            if options.minutes and time.monotonic() - started + longest > options.minutes * 60:
                print(f"{options.minutes:g} minutes would be passed: {arm} with seed {seed} and what follows is left", file=sys.stderr)
                return
            begun = time.monotonic()
            unit = _unit(arm, seed, [*arms[arm], *options.set], rows, options)
            longest = max(longest, time.monotonic() - begun)
            options.results.mkdir(parents=True, exist_ok=True)
            write_json(stored, unit)
            print(f"{arm} with seed {seed}: {unit['seconds']:.0f} s", file=sys.stderr, flush=True)


def _need_data(options: argparse.Namespace) -> dict[str, Any]:
    """The recall task of the data, written where it is missing."""
    if not (options.data / "train/manifest.json").exists():
        extra = options.row_options.split() or ["--rows", "320000"]
        _run("data_prep/recall_rows.py", "--out", str(options.data), *extra)
    return read_json(options.data / "train/manifest.json")["recall"]


def _unit(arm: str, seed: int, overrides: list[str], rows: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    run_dir = options.work / f"{arm}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)  # a unit is done whole
    started = time.perf_counter()
    vocabulary = 3 + rows["keys"] + rows["values"] + rows["fillers"]
    fields = [
        f"run_dir={run_dir}", f"train.model_seed={seed}", f"train.data_seed={seed}", f"train.window_seed={seed}",
        f"model.vocab_size={vocabulary}", f"data.sequence_length={rows['length']}",
        f"data.train=[{{path: {options.data}/train}}]", f"data.validation=[{{path: {options.data}/validation}}]", *overrides,
    ]  # fmt: skip
    _run("-m", "launcher.run", str(BASE), *fields)
    config = load_config(run_dir / "config.yaml")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tests = {}
    for window in sorted({16, 256} if "S" in config.model.pattern else {256}):
        if window > rows["length"]:
            continue
        out = run_dir / f"evaluation-{window}"
        shape = [f"--recall-{name}={rows[name]}" for name in ("keys", "values", "fillers", "pairs")]
        _run("-m", "swax_megatron.eval", str(run_dir), "--out", str(out), "--recall", f"--recall-lengths={options.test_lengths}",
             f"--recall-rows={options.test_rows}", f"--window={window}", "--batch=16", *shape)  # fmt: skip
        tests[str(window)] = read_json(out / "results.json")["recall"]
    return {
        "arm": arm,
        "seed": seed,
        "overrides": overrides,
        "rows": rows,
        "steps": config.train.steps,
        "test_window": config.window.test_window,
        "loss_train": statistics.fmean(line["loss/train"] for line in metrics[-50:]),
        "loss_validation": metrics[-1].get("loss/validation"),
        "recall": tests,
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _run(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    subprocess.run([sys.executable, *(str(ROOT / part) if part.endswith(".py") else part for part in command)], env=environment, check=True)


def write_report(folder: Path) -> Path:
    """report.md and a plot a test length: share recalled by gap, mean and range over the seeds of every arm, at its own test window."""
    units = [read_json(path) for path in sorted(folder.glob("*-*.json"))]
    if not units:
        raise ValueError(f"--results {folder} holds no unit yet; run scripts/reproduce_effect.py first")
    lines = ["# Recall by gap", "", f"Device: {', '.join(sorted({unit['device'] for unit in units}))}."]
    for window in sorted({window for unit in units for window in unit["recall"]}, key=int):
        for length in sorted({entry["length"] for unit in units for entry in unit["recall"].get(window, [])}):
            shares = _shares(units, window, length)
            gaps = sorted({gap for by_gap in shares.values() for gap in by_gap})
            head = ["arm (seeds)", *(f"{low}-{high - 1}" for low, high in gaps)]
            body = [
                [f"{arm} ({max(map(len, by_gap.values()))})", *(_spread(by_gap.get(gap, [])) for gap in gaps)]
                for arm, by_gap in shares.items()
            ]
            lines += ["", f"## Rows of {length} tokens, test window {window}", "", *_table(head, body)]
            curves = [(arm, [(gap[0], statistics.fmean(values)) for gap, values in by_gap.items()]) for arm, by_gap in shares.items()]
            plot = line_plot(folder / f"recall_{length}_window_{window}.png", curves, "gap (tokens)", "share recalled", (0, 1))
            lines += ["", f"![{plot.stem}]({plot.name})"]
    report = folder / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report


def _shares(units: list[dict], window: str, length: int) -> dict[str, dict[tuple[int, int], list[float]]]:
    """arm -> gap range -> one share a seed."""
    shares: dict[str, dict[tuple[int, int], list[float]]] = {}
    for unit in units:
        for entry in unit["recall"].get(window, []):
            if entry["length"] == length:
                for gap in entry["by_gap"]:
                    shares.setdefault(unit["arm"], {}).setdefault((gap["from"], gap["to"]), []).append(gap["accuracy"])
    return shares


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.fmean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f}-{max(values):.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    sys.exit(main())
