"""The other batch scripts on a real Slurm: sharding as an array and a join, an evaluation, and what they only say with --dry-run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from tests.slurm.jobs import ROOT, Cluster, slurm
from tests.texts import run_shard, small_tokenizer, texts, write_jsonl


def submit(script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "SWAX_HOME": str(ROOT)}
    command = ["sbatch", "--parsable", *options, f"slurm/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait() -> None:
    deadline = time.monotonic() + 300
    while slurm("squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert slurm("squeue", "-h") == ""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "made"), ({"SWAX_VENV": "{}/other"}, "other"), ({"VIRTUAL_ENV": "x"}, "none"), ({"SWAX_PYTHON": "/mine"}, "/mine")],
    ids=["make install", "the site's", "an active one", "named"],
)
def test_which_python_a_job_runs(settings: dict[str, str], expected: str, tmp_path: Path) -> None:
    """Jobs of a clean clone use the environment that make install made, unless somebody chose another."""
    for folder, name in ((".venv", "made"), ("other", "other")):
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "bin" / "activate").write_text(f"activated={name}\n")
    (tmp_path / "slurm").mkdir()
    said = '[ "$python" = python ] || activated=$python; echo "${activated:-none}"'
    script = f"home={tmp_path}; . {ROOT}/slurm/common.sh; load_site >/dev/null; {said}"
    environment = {"PATH": os.environ["PATH"], "SWAX_SCRATCH": "/tmp"}
    environment |= {name: value.format(tmp_path) for name, value in settings.items()}
    assert subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_dry_runs_name_the_part_and_the_command(cluster: Cluster, tmp_path: Path) -> None:
    output = f"--output={tmp_path}/%x-%a.out"
    submit("shard.sh", "--input", "x", "--out", "y", "--dry-run", options=(output, "--array=1-2"))
    submit("convert_hf.sh", "--checkpoint", "runs/x", "--out", "y", "--dry-run", options=(f"--output={tmp_path}/convert.out",))
    submit("eval.sh", "exports/x", "--out", "y", "--window", "9", "--dry-run", options=(f"--output={tmp_path}/eval.out",))
    submit("shard.sh", "--merge", options=(output, "--array=3"))
    wait()
    for part in (1, 2):
        said = (tmp_path / f"swax_shard-{part}.out").read_text()
        assert f"--input x --out y --part {part}/2" in said
        assert said.index("data_prep/shard.py --workers ") < said.index(" --input x")  # a user's own comes last
    assert "-m swax_megatron.hf.export --checkpoint runs/x --out y" in (tmp_path / "convert.out").read_text()
    assert "-m swax_megatron.eval exports/x --out y --window 9" in (tmp_path / "eval.out").read_text()
    assert "error: --merge joins the parts once, in a job without --array" in (tmp_path / "swax_shard-3.out").read_text()


def test_an_evaluation_writes_its_report_and_passes_a_refusal_on(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports draw plots: pip install '.[eval]'")
    torch.manual_seed(0)
    config = SwaxConfig(
        vocab_size=33, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_mlstm_heads=2,
        layer_types=["sliding_attention", "linear_attention"], sliding_window=4,
    )  # fmt: skip
    SwaxForCausalLM(config).save_pretrained(tmp_path / "export")
    rows = [f"--recall-{name}={number}" for name, number in {"keys": 10, "values": 10, "fillers": 10, "pairs": 4}.items()]
    options = (f"--output={tmp_path}/%j.out", "--cpus-per-task=1")
    arguments = (str(tmp_path / "export"), "--out", str(tmp_path / "out"), "--recall", "--recall-lengths=64", "--recall-rows=2", *rows)
    done, refused = submit("eval.sh", *arguments, options=options), submit("eval.sh", *arguments[:3], options=options)
    wait()
    said = (tmp_path / f"{done}.out").read_text()
    assert (tmp_path / "out" / "report.md").exists(), said
    assert json.loads((tmp_path / "out" / "results.json").read_text())["recall"][0]["length"] == 64
    assert "this job has no GPU and evaluates on the CPU" in said
    assert "error: nothing to evaluate" in (tmp_path / f"{refused}.out").read_text()
    assert "ExitCode=2:0" in slurm("scontrol", "-o", "show", "job", refused)


@pytest.mark.soak
def test_an_array_of_parts_and_a_join_write_what_one_process_writes(cluster: Cluster, tmp_path: Path) -> None:
    source, model = write_jsonl(tmp_path / "corpus.jsonl", texts(400)), small_tokenizer(tmp_path)
    assert run_shard([source], model, tmp_path / "alone", "--segment-bytes", "20k") == 0
    arguments = ("--input", str(source), "--tokenizer", str(model), "--out", str(tmp_path / "data"), "--segment-bytes", "20k")
    output = f"--output={tmp_path}/%A_%a.out"
    array = submit("shard.sh", *arguments, options=(output, "--array=1-2", "--cpus-per-task=1"))
    submit("shard.sh", *arguments, "--merge", options=(output, f"--dependency=afterok:{array}", "--cpus-per-task=1"))
    wait()
    said = "".join(path.read_text() for path in tmp_path.glob("*.out"))
    files = {path.relative_to(tmp_path / "alone"): path.read_bytes() for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    assert files and {path: (tmp_path / "data" / path).read_bytes() for path in files} == files, said
