"""The experiment on windows: units that are kept whole, cut off and continued; what they hold; the report of what is stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from data_prep import recall_rows
from scripts import reproduce_effect
from swax_megatron.config import load_config
from swax_megatron.data.recall import RecallTask, make_row
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval import __main__ as evaluation
from swax_megatron.eval import study
from swax_megatron.validate import validate

pytest.importorskip("matplotlib", reason="reports draw plots: pip install '.[eval]'")

STEPS, CUT = 12, 7  # of a unit; the 0-based step in which one gets a SIGTERM
TASK = RecallTask(keys=20, values=3, fillers=10, pairs=4, length=64, near=32)  # three values: an untrained model is right here and there
ROWS = "--keys 20 --values 3 --fillers 10 --pairs 4 --length 64 --near 32".split()
BASE = {
    "model": {"pattern": "SM", "hidden_size": 16, "ffn_hidden_size": 16, "attention_heads": 2, "mlstm_heads": 2, "init_std": 0.3},
    "data": {"sequence_length": 64},
    "optimizer": {"backend": "megatron", "learning_rate": 1e-2, "warmup": 2},
    "train": {"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 4, "precision": "fp32", "threads": 1},
    "checkpoint": {"interval": 1000},
    "monitor": {"recall_interval": 6, "peak_tflops": 1.0},
}
ARMS = {
    "small": ["window.schedule=fixed", "window.windows=[3]"],
    "mixed": ["window.windows=[3,40]", "window.anneal_fraction=0"],
}
TESTS = {
    "write_data": f"data_prep/recall_rows.py --out {{data}} --rows 200 --validation-rows 4 --workers 1 {' '.join(ROWS)}",
    "windows": [3, 40],
    "options": ["--recall", "--recall-lengths=64", "--recall-rows=16", "--batch=16"],  # as many rows as the callback reads
}


@dataclass(frozen=True)
class Spells:
    """Three calls of the script: every unit cut off in step CUT; one arm; both."""

    folder: Path
    cut_off: tuple[int, list[str]]  # exit code, results
    one_arm: tuple[int, list[str]]
    both: tuple[int, list[str]]
    untouched: bool  # the last call left the first arm's result and log alone

    def call(self, *options: str, arms: str = "small,mixed", to: str = "") -> int:
        """The script's exit code; to: a suffix of the folders of runs and results."""
        paths = [f"--{name}={self.folder / name}{'' if name in ('experiment', 'data') else to}" for name in PATHS]
        return reproduce_effect.main([*paths, "--arms", arms, "--seeds", "1", "--parallel", "2", *options])

    def unit(self, name: str, to: str = "") -> dict:
        return json.loads((self.folder / f"results{to}/{name}.json").read_text())


PATHS = ("experiment", "data", "work", "results")


@pytest.fixture(scope="module")
def spells(tmp_path_factory: pytest.TempPathFactory) -> Spells:
    folder = tmp_path_factory.mktemp("effect")
    (folder / "experiment").mkdir()
    for name, content in {"base": BASE, "arms": ARMS, "tests": TESTS}.items():
        (folder / f"experiment/{name}.yaml").write_text(yaml.safe_dump(content))
    call = Spells(folder, (0, []), (0, []), (0, []), False).call

    def results() -> list[str]:
        return sorted(path.name for path in (folder / "results").glob("*.json*"))

    cut_off = call("--set", "resilience.fault=sigterm", f"resilience.fault_step={CUT}"), results()
    one_arm = call(arms="small"), results()
    files = folder / "results/small-1.json", folder / "work/small-1.log"
    before = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    both = call(), results()
    return Spells(folder, cut_off, one_arm, both, before == [(path.stat().st_mtime_ns, path.stat().st_size) for path in files])


def test_units_are_kept_whole_or_not_at_all(spells: Spells) -> None:
    assert spells.cut_off == (0, [])
    assert spells.one_arm == (0, ["small-1.json"])
    assert spells.both == (0, ["mixed-1.json", "small-1.json"]) and spells.untouched
    report = (spells.folder / "results/report.md").read_text()
    assert "| small | 1 |" in report and "Recall by gap: rows of 64 tokens, test window 40" in report


def test_a_unit_that_was_cut_off_equals_one_that_was_not(spells: Spells) -> None:
    steps = [json.loads(line)["step"] for line in (spells.folder / "work/mixed-1/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))
    log = (spells.folder / "work/mixed-1.log").read_text()
    assert f"step {CUT + 1} of {STEPS}" in log, log  # the second start began there
    assert spells.call(arms="mixed", to="-whole") == 0
    timed = ("seconds", "step_seconds")
    whole, continued = ({k: v for k, v in spells.unit("mixed-1", to).items() if k not in timed} for to in ("-whole", ""))
    for each in (whole, continued):
        for found in each["tests"].values():
            assert found["recall"]
    assert continued == whole


def test_recall_in_training_is_what_the_evaluation_finds(spells: Spells) -> None:
    unit = spells.unit("mixed-1")
    last, seen = unit["curves"][-1], []
    assert last["step"] == STEPS
    for window in ("3", "40"):
        (entry,) = unit["tests"][window]["recall"]
        wanted = {f"recall/window_{window}/gap_{gap['from']:05d}": gap["accuracy"] for gap in entry["by_gap"]}
        found = {name: value for name, value in last.items() if name.startswith(f"recall/window_{window}/")}
        assert found == pytest.approx(wanted, abs=1e-6)
        seen += wanted.values()
    assert len(set(seen)) > 3 and max(seen) > 0.05  # figures that could differ


def test_what_is_stored_of_another_experiment_is_refused(spells: Spells, capsys: pytest.CaptureFixture) -> None:
    before = [path.stat().st_mtime_ns for path in sorted((spells.folder / "results").iterdir())]
    assert spells.call("--set", "train.steps=13") == 2
    assert "small-1.json was made with other overrides; name other --results" in capsys.readouterr().err
    assert spells.call("--experiment", str(reproduce_effect.ROOT / "configs/recall"), arms="small") == 2
    assert "small-1.json was made with other base.yaml and overrides and tests.yaml" in capsys.readouterr().err
    assert before == [path.stat().st_mtime_ns for path in sorted((spells.folder / "results").iterdir())]


def test_the_time_is_over(spells: Spells, capsys: pytest.CaptureFixture) -> None:
    """One unit is ended while it starts; the others are not begun. That is no failure, and nothing is stored."""
    assert spells.call("--minutes", "0.001", "--parallel", "1", to="-late") == 0
    assert "1 units are cut off, 1 were not begun" in capsys.readouterr().err
    assert not list((spells.folder / "results-late").iterdir())


def test_a_unit_that_fails_is_named(spells: Spells, capsys: pytest.CaptureFixture) -> None:
    assert spells.call("--set", "model.hidden_size=-1", arms="small", to="-failed") == 1
    told = capsys.readouterr().err
    assert "small-1: exit code 2, see " in told
    assert "model.hidden_size=-1: must be at least 1" in (spells.folder / "work-failed/small-1.log").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--arms", "smal"], "--arms smal: not in "),
        (["--seeds", "one"], "--seeds one: give comma-separated numbers"),
        (["--parallel", "0"], "--parallel 0: must be at least 1"),
        (["--experiment", "nowhere"], "--experiment nowhere: has no base.yaml"),
    ],
)
def test_refused(options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert reproduce_effect.main(["--data", str(tmp_path), "--work", str(tmp_path), "--results", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


NEEDLES = ("needles_saved_window_8.png", "needles_guessed_window_8.png")


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (reproduce_effect.ROOT / "configs").glob("*/arms.yaml")))
def test_the_shipped_experiments_can_be_started(folder: str) -> None:
    experiment = reproduce_effect.Experiment.read(reproduce_effect.ROOT / "configs" / folder)
    windows = set()
    for overrides in experiment.arms.values():
        config = load_config(experiment.folder / "base.yaml", overrides)
        validate(config, 1, cuda=True)
        windows |= set(config.window.windows) if "S" in config.model.pattern else set()
    assert set(experiment.tests["windows"]) == windows  # every run is tested at the windows of all
    evaluation.parser().parse_args(["run", "--out", "out", *experiment.tests["options"]])


def stored_unit(arm: str, seed: int, far: float) -> dict:
    """A unit as the script stores it, with figures that are easy to read."""
    gaps = [{"from": 8, "to": 16, "accuracy": 0.9, "queries": 9}, {"from": 16, "to": 60, "accuracy": far, "queries": 9}]
    buckets = [{"from": 0, "to": 64, "nats": 3 + far, "tokens": 9}]
    return {
        "arm": arm, "seed": seed, "parameters": 1000 + seed, "rows": {"length": 64}, "test_window": 8,
        "config": {
            "model": {"pattern": "SM"}, "window": {"schedule": "fixed", "windows": [8], "anneal_fraction": 0.1}, "train": {"steps": 5},
        },
        "loss": [[50, 2.0 + seed]],
        "curves": [{"step": step, "recall/window_8/gap_00016": far * step / 5} for step in (1, 5)],
        "tests": {
            "8": {
                "recall": [{"length": 64, "by_gap": gaps}],
                "perplexity": [{"nats": 3 + far, "by_position": buckets, "share_beyond_window": 0.25}],
                "needles": [{"by_gap": [{"gap": 64, "nats": 3 - far, "control_nats": 3.0, "right": far}]}],
                "ruler": [{"task": "vt", "length": 1024, "score": 100 * far}],
            }
        },
        "device": "a device", "seconds": {"train": 10 * seed},
    }  # fmt: skip


def test_the_report_shows_means_with_their_range_and_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arm, values in {"small": (0.2, 0.3, 0.7), "large": (0.0, 0.1)}.items():
        for seed, far in enumerate(values, 1):
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(stored_unit(arm, seed, far)))
    assert study.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| small (3) | 0.900 (0.900-0.900) | 0.400 (0.200-0.700) |" in text
    assert "| large (2) | 0.900 (0.900-0.900) | 0.050 (0.000-0.100) |" in text
    assert "| small (3) | 3.400 (3.200-3.700) | 3.400 (3.200-3.700) |" in text  # loss by position
    assert "| small (3) | 40.0 (20.0-70.0) |" in text  # RULER
    assert text.count("| small (3) | 0.400 (0.200-0.700) |") == 2  # needles: loss saved and share guessed
    assert "| small | 3 | SM | fixed [8], anneal 0.1 | 1,001 | 5 | 4.000 (3.000-5.000) | 20 |" in text
    plots = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(plots) == {"recall_64_window_8.png", "loss_window_8.png", "vt_window_8.png", "training_gap_16.png", *NEEDLES}
    assert all(f"]({name})" in text for name in plots)
    for name in ("report.md", *plots):
        (tmp_path / name).unlink()
    assert study.main([str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == plots and (tmp_path / "report.md").read_text() == text
    (tmp_path / "large-2.json").write_text(json.dumps(stored_unit("large", 2, 0.9)))
    assert study.main([str(tmp_path)]) == 0
    assert {name for name in plots if (tmp_path / name).read_bytes() != plots[name]} == set(plots)  # drawn from what is stored


@pytest.mark.parametrize(("results", "configuration"), [("effect", "recall"), ("text", "text")])
def test_the_shipped_results_are_of_the_shipped_experiment_and_give_their_report_again(
    results: str, configuration: str, tmp_path: Path
) -> None:
    shipped = reproduce_effect.ROOT / "benchmarks/results" / results
    experiment = reproduce_effect.Experiment.read(reproduce_effect.ROOT / "configs" / configuration)
    units = {path.name: json.loads(path.read_text()) for path in shipped.glob("*-*.json")}
    assert len(units) == {"effect": 18, "text": 6}[results]
    for name, unit in units.items():
        wanted = {"base.yaml": experiment.base, "overrides": experiment.arms[unit["arm"]]}
        wanted["tests.yaml"] = {key: experiment.tests[key] for key in ("windows", "options")}
        assert {key: value for key, value in unit["asked"].items() if key != "data"} == wanted, name
        (tmp_path / name).write_text((shipped / name).read_text())
    assert len({unit["asked"]["data"] for unit in units.values()}) == 1
    assert study.main([str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == (shipped / "report.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in shipped.glob("*.png")}


def test_the_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert study.main([str(tmp_path)]) == 2
    assert "holds no unit yet" in capsys.readouterr().err


def test_recall_rows_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    rows = recall_rows.BLOCK * 2 + 50
    written = []
    for workers in ("1", "3"):
        out = tmp_path / workers
        assert recall_rows.main(["--out", str(out), "--rows", str(rows), "--validation-rows", "5", "--workers", workers, *ROWS]) == 0
        written.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert written[0] == written[1] and len(written[0]) >= 6
    train = ShardedDataset(tmp_path / "3/train", verify="sha256")
    assert train.documents == rows
    for number in (0, recall_rows.BLOCK - 1, recall_rows.BLOCK, rows - 1):  # in their order over the blocks
        row = make_row(TASK, 1, number)
        assert (train.document(0, number) == row.ids).all() and (train.document_mask(0, number) == row.mask).all()
