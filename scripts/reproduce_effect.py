"""The experiments on attention windows: does a short or a stochastic window teach the memory what a large one lets it ignore?

An experiment is a folder: base.yaml (a configuration), arms.yaml (overrides of it by arm) and tests.yaml (the data's commands, the
windows and options of the evaluation). Every (arm, seed) is one unit: trained, tested, and kept as one file of --results.
Several units run at the same time, a process each, because one alone leaves most of a GPU idle. A unit that is cut off has
saved a checkpoint, and the next call goes on there, exactly; where its run directory is gone it begins again. Results of another
configuration, data set or test are refused: one report never mixes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swax_megatron.eval.study import write_report
from swax_megatron.eval.units import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
GRACE = 45.0  # seconds that a unit has for its checkpoint when the time is over
THINNED = 50  # steps of the loss that become one stored mean
EPILOG = """\
examples:
  python scripts/reproduce_effect.py                                      # every unit that is not stored yet, then the report
  python scripts/reproduce_effect.py --arms small,large --minutes 9       # ends what is not done after nine minutes; call again
  python scripts/reproduce_effect.py --experiment configs/text --data data/text \\
      --work runs/text --results runs/text/results
  python -m swax_megatron.eval.study benchmarks/results/effect            # the report of what is stored
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, default=ROOT / "configs/recall", help="its folder (default configs/recall)")
    parser.add_argument("--arms", help="comma-separated (default: all of arms.yaml)")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated (default 1,2,3)")
    parser.add_argument("--data", type=Path, default=Path("data/recall"), help="data; rows of recall are written where missing")
    parser.add_argument("--work", type=Path, default=Path("runs/effect"), help="run directories (default runs/effect)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/effect"), help="stored units and the report")
    parser.add_argument("--parallel", type=int, default=1, help="units at the same time (default 1)")
    parser.add_argument("--minutes", type=float, help="end what is not done by then, with a checkpoint")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.field=value", help="overrides of every arm, e.g. train.steps=50")
    parser.add_argument("--unit", metavar="ARM-SEED", help=argparse.SUPPRESS)  # what this program starts
    options = parser.parse_args(argv)
    try:
        experiment = Experiment.read(options.experiment)
        if options.unit:
            return run_unit(experiment, options)
        failed = run_units(experiment, options)
        if any(options.results.glob("*-*.json")):
            print(write_report(options.results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


@dataclass(frozen=True)
class Experiment:
    """arms: name -> overrides; tests: write_data (a command or several), windows, options (of ``python -m swax_megatron.eval``)."""

    folder: Path
    base: dict[str, Any]
    arms: dict[str, list[str]]
    tests: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Experiment:
        for name in ("base", "arms", "tests"):
            if not (folder / f"{name}.yaml").exists():
                raise ValueError(f"--experiment {folder}: has no {name}.yaml; give a folder such as configs/recall")
        return cls(folder, *(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("base", "arms", "tests")))

    def units(self, options: argparse.Namespace) -> list[str]:
        """Names of the chosen units, seed by seed."""
        chosen = options.arms.split(",") if options.arms else list(self.arms)
        if unknown := [arm for arm in chosen if arm not in self.arms]:
            raise ValueError(f"--arms {','.join(unknown)}: not in {self.folder / 'arms.yaml'}; it has {', '.join(self.arms)}")
        try:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        except ValueError:
            raise ValueError(f"--seeds {options.seeds}: give comma-separated numbers, e.g. --seeds 1,2,3") from None
        return [f"{arm}-{seed}" for seed in seeds for arm in chosen]

    def asked(self, unit: str, options: argparse.Namespace) -> dict[str, Any]:
        """What the result of a unit depends on besides its seed and the code."""
        return {
            "base.yaml": self.base,
            "overrides": [*self.arms[unit.rpartition("-")[0]], *options.set],
            "tests.yaml": {name: self.tests[name] for name in ("windows", "options")},
            "data": hashlib.sha256((options.data / "train/manifest.json").read_bytes()).hexdigest(),
        }


def run_units(experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """Run every unit that is not stored; returns the names of those that failed."""
    if options.parallel < 1:
        raise ValueError(f"--parallel {options.parallel}: must be at least 1")
    units = experiment.units(options)
    _need_data(experiment, options.data)
    waiting = [unit for unit in units if not _stored(experiment, unit, options)]
    options.results.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (options.minutes * 60 if options.minutes else float("inf"))
    running: dict[str, subprocess.Popen] = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < options.parallel and time.monotonic() < end:
            unit = waiting.pop(0)
            running[unit] = _start(unit, options)
        time.sleep(0.5)
        for unit in [unit for unit, process in running.items() if process.poll() is not None]:
            code = running.pop(unit).returncode
            stored = (options.results / f"{unit}.json").exists()
            failed += [] if stored or code == 75 else [unit]
            print(f"{unit}: {'stored' if stored else f'exit code {code}, see {options.work / unit}.log'}", file=sys.stderr, flush=True)
        if time.monotonic() > end:
            print(f"the time is over: {len(running)} units are cut off, {len(waiting)} were not begun", file=sys.stderr, flush=True)
            _cut_off(list(running.values()))
            break
    return failed


def _stored(experiment: Experiment, unit: str, options: argparse.Namespace) -> bool:
    """Whether the unit is done. Raises ValueError where what is stored answers another question."""
    path = options.results / f"{unit}.json"
    if not path.exists():
        return False
    there, wanted = read_json(path).get("asked", {}), experiment.asked(unit, options)
    if other := [name for name in wanted if there.get(name) != wanted[name]]:
        raise ValueError(f"--results: {path} was made with other {' and '.join(other)}; name other --results and --work, or delete it")
    return True


def _start(unit: str, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).resolve()), "--unit", unit, "--experiment", str(options.experiment)]
    command += ["--data", str(options.data), "--work", str(options.work), "--results", str(options.results), "--set", *options.set]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (options.work / f"{unit}.log").open("a") as log:
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT)


def _cut_off(processes: list[subprocess.Popen]) -> None:
    """Ask for a checkpoint; end what takes too long."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _need_data(experiment: Experiment, data: Path) -> None:
    """Write the data where they are missing and the experiment knows how."""
    if (data / "train/manifest.json").exists():
        return
    if not experiment.tests.get("write_data"):
        raise ValueError(f"--data {data}: holds no data set train/, and {experiment.folder}/tests.yaml names no write_data that makes one")
    data.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    commands = experiment.tests["write_data"]
    for command in [commands] if isinstance(commands, str) else commands:
        script, *rest = shlex.split(command)
        arguments = [one for part in rest for one in (_library() if part == "{stdlib}" else [part.format(data=data)])]
        subprocess.run([sys.executable, str(ROOT / script), *arguments], env=environment, check=True)


def _library() -> list[str]:
    """Files and folders of Python's own library, without what was installed into it."""
    paths = Path(sysconfig.get_path("stdlib")).iterdir()
    return sorted(str(path) for path in paths if path.suffix == ".py" or path.is_dir() and path.name.isalnum())


def run_unit(experiment: Experiment, options: argparse.Namespace) -> int:
    """Train, test and store one unit in this process: what it imports takes longer than some of its work."""
    from swax_megatron import train

    arm, _, seed = options.unit.rpartition("-")
    run_dir, started = options.work / options.unit, time.perf_counter()
    manifest = read_json(options.data / "train/manifest.json")
    rows = manifest.get("recall")
    fields = [
        f"run_dir={run_dir}", f"train.model_seed={seed}", f"train.data_seed={seed}", f"train.window_seed={seed}",
        f"data.train=[{{path: {options.data}/train}}]", f"data.validation=[{{path: {options.data}/validation}}]",
        f"model.vocab_size={manifest['tokenizer']['vocab_size']}", *([f"data.sequence_length={rows['length']}"] if rows else []),
        *experiment.arms[arm], *options.set,
    ]  # fmt: skip
    if code := train.main([str(experiment.folder / "base.yaml"), *fields]):
        return int(code)
    trained = time.perf_counter()
    unit = _unit(experiment, options, run_dir, rows)
    seconds = {"train": trained - started, "test": time.perf_counter() - trained}
    asked = experiment.asked(options.unit, options)
    write_json(options.results / f"{options.unit}.json", {"arm": arm, "seed": int(seed), "asked": asked, **unit, "seconds": seconds})
    return 0


def _unit(experiment: Experiment, options: argparse.Namespace, run_dir: Path, rows: dict[str, Any] | None) -> dict[str, Any]:
    """Tests of a trained run, and what its report needs."""
    import torch

    from swax_megatron.config import load_config, to_dict
    from swax_megatron.eval.__main__ import main as evaluate
    from swax_megatron.model.cost import param_count

    config = load_config(run_dir / "config.yaml")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shape = [f"--recall-{name}={rows[name]}" for name in ("keys", "values", "fillers", "pairs")] if rows else []
    tests = {}
    for window in experiment.tests["windows"] if "S" in config.model.pattern else experiment.tests["windows"][-1:]:
        out = run_dir / f"evaluation-{window}"
        wanted = [option.format(data=options.data) for option in experiment.tests["options"]]
        if evaluate([str(run_dir), "--out", str(out), f"--window={window}", *wanted, *shape]):
            raise ValueError(f"the evaluation of {run_dir} at window {window} was refused; its log says why")
        found = read_json(out / "results.json")
        tests[str(window)] = {kind: found[kind] for kind in ("recall", "ruler", "perplexity", "needles", "memory") if found[kind]}
    loss = [line["loss/train"] for line in lines]
    watched = ("recall/", "loss/validation")
    return {
        "parameters": param_count(config.model),
        "config": {name: to_dict(config)[name] for name in ("model", "window", "optimizer", "train")},
        "rows": rows,
        "test_window": config.window.test_window,
        "loss": [[start + THINNED, statistics.fmean(loss[start : start + THINNED])] for start in range(0, len(loss), THINNED)],
        "curves": [{"step": x["step"] + 1, **{k: v for k, v in x.items() if k.startswith(watched)}} for x in lines if _has(x, watched)],
        "step_seconds": statistics.median(line["time/step"] for line in lines),
        "tests": tests,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _has(line: dict[str, float], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in line)


if __name__ == "__main__":
    sys.exit(main())
