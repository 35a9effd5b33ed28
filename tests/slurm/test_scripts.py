"""The other batch scripts on a real Slurm: sharding as an array and a join, and what both only say with --dry-run."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

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
    submit("shard.sh", "--merge", options=(output, "--array=3"))
    wait()
    for part in (1, 2):
        said = (tmp_path / f"swax_shard-{part}.out").read_text()
        assert f"--input x --out y --part {part}/2" in said
        assert said.index("data_prep/shard.py --workers ") < said.index(" --input x")  # a user's own comes last
    assert "-m swax_megatron.hf.export --checkpoint runs/x --out y" in (tmp_path / "convert.out").read_text()
    assert "error: --merge joins the parts once, in a job without --array" in (tmp_path / "swax_shard-3.out").read_text()


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
