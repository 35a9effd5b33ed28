"""Which nodes are unfit: judged from reports; two real processes that measure each other; what Slurm's words mean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.checks import Floors, _products, _xid, compare
from launcher.points import point, read_sweep, write_points
from launcher.slurm import directive, duration, gpu_count, gpus_of, lead, read_site
from swax_megatron.hardware import known_peak
from tests.workers import free_port

ROOT = Path(__file__).parents[2]


def reports(count: int, **broken: Any) -> dict[str, dict[str, Any]]:
    """Nodes n0, n1, ...; n1 has the given values instead of the usual ones."""
    usual = {
        "gpus": 8,
        "free_gb": {"/scratch": 900.0},
        "memory_gb": 400.0,
        "versions": {"torch": "2.11", "driver": "570"},
        "matmul_tflops": [700.0] * 8,
        "peak_tflops": 989.0,
        "bandwidth": 40.0,
        "skew": 0.01,
        "faults": [],
        "missed": {},
    }
    return {f"n{index}": {**usual, **(broken if index == 1 else {})} for index in range(count)}


@pytest.mark.parametrize(
    ("broken", "floors", "said"),
    [
        ({"gpus": 7, "matmul_tflops": [700.0] * 7}, {}, "7 GPUs, 8 expected"),
        ({"faults": ["GPU 3: 2 uncorrected memory errors (ECC)"]}, {}, "GPU 3: 2 uncorrected memory errors"),
        ({"free_gb": {"/scratch": 0.5}}, {}, "0.5 GB free in /scratch, at least 2 wanted"),
        ({"memory_gb": 0.2}, {}, "0.2 GB of free memory"),
        ({"skew": -30.0}, {}, "its clock is -30.0 s off"),
        ({"versions": {"torch": "2.10", "driver": "570"}}, {}, "torch 2.10, other nodes have 2.11"),
        ({"matmul_tflops": [700.0] * 7 + [500.0]}, {}, "a matrix product reaches 500 TFLOP/s, 71% of the median of 4 nodes"),
        ({"bandwidth": 20.0}, {}, "all-reduce with its neighbours reaches 20 GB/s, 50% of the median"),
        ({"bandwidth": None, "missed": {"0": "timed out", "2": "reset"}}, {}, "no all-reduce with n0 (timed out); no all-reduce with n2"),
        ({"reached": False, "problem": "refused", "bandwidth": None}, {}, "cannot reach the first node (refused)"),
        ({"gpus": 4, "matmul_tflops": [380.0] * 4}, {"min_gpus": 4}, "a matrix product reaches 380 TFLOP/s, at least 395.6 wanted"),
        ({"bandwidth": 39.0}, {"min_bandwidth": 39.5}, "reaches 39 GB/s, at least 39.5 wanted"),
    ],
)
def test_an_unfit_node_is_named_with_its_reason(broken: dict[str, Any], floors: dict[str, float], said: str) -> None:
    found = compare(reports(4, **broken), [f"n{index}" for index in range(4)], Floors(**floors))
    assert list(found) == ["n1"] and said in "; ".join(found["n1"])


def test_below_four_nodes_only_floors_count() -> None:
    slow = reports(3, matmul_tflops=[100.0] * 8, bandwidth=1.0, peak_tflops=None)
    names = ["n0", "n1", "n2"]
    assert compare(slow, names, Floors()) == {}
    assert list(compare(slow, names, Floors(min_matmul=400.0))) == ["n1"]
    assert list(compare(slow, names, Floors(min_gpus=9))) == names


def test_of_two_nodes_the_one_with_fewer_gpus_is_unfit() -> None:
    found = compare(reports(2, gpus=7, matmul_tflops=[700.0] * 7), ["n0", "n1"], Floors())
    assert found == {"n1": ["7 GPUs, 8 expected"]}


def test_a_silent_node_is_named_and_its_neighbours_are_not() -> None:
    """Two nodes, three, four: who waited for the dead one in vain, and has no clock to compare with, is fit."""
    assert list(compare(reports(3), ["n0", "n1", "n2", "n3"], Floors())) == ["n3"]
    alone = {"n0": reports(1)["n0"] | {"bandwidth": None, "missed": {"1": "timed out"}}}
    assert list(compare(alone, ["n0", "n1"], Floors())) == ["n1"]
    three = reports(2, bandwidth=None, skew=None, missed={"2": "timed out"})
    assert list(compare(three, ["n0", "n1", "n2"], Floors())) == ["n2"]
    headless = {"n1": reports(2, reached=False, problem="refused", skew=None, bandwidth=None)["n1"]}
    assert list(compare(headless, ["n0", "n1"], Floors())) == ["n0"]


def test_partners_with_faults_of_their_own_excuse_a_node() -> None:
    known = reports(4, bandwidth=None, missed={"0": "timed out", "2": "timed out"})
    for node in ("n0", "n2"):
        known[node]["faults"] = ["cuda:0: a matrix product failed (ECC)"]
    names = ["n0", "n1", "n2", "n3"]
    assert sorted(compare(known, names, Floors())) == ["n0", "n2"]
    known["n2"]["faults"] = []
    assert sorted(compare(known, names, Floors())) == ["n0", "n1"], "n2 is fit and n1 did not reach it"


def test_a_node_that_did_not_finish_is_unfit() -> None:
    known = reports(2)
    del known["n1"]["bandwidth"]
    assert compare(known, ["n0", "n1"], Floors()) == {"n1": ["did not finish measuring with its neighbours"]}
    single = reports(1)
    del single["n0"]["bandwidth"], single["n0"]["skew"], single["n0"]["missed"]
    assert compare(single, ["n0"], Floors()) == {}


def test_a_first_node_that_nobody_reaches_is_the_one_to_blame() -> None:
    known = reports(4)
    for node in ("n1", "n2", "n3"):
        known[node] |= {"bandwidth": None, "reached": False, "problem": "refused"}
    names = ["n0", "n1", "n2", "n3"]
    assert compare(known, names, Floors()) == {"n0": ["no other node could reach it"]}


def test_old_and_harmless_xid_messages_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100 * 3600.0)
    told = ((2, 79), (99, 63), (99, 31), (98, 48))  # hours since the boot, number
    lines = [f"[{hours * 3600:.6f}] NVRM: Xid (PCI:0000:3b:00): {number}, pid=1" for hours, number in told]
    (tmp_path / "dmesg").write_text("#!/bin/sh\ncat <<'TEXT'\n" + "\n".join(lines) + "\nTEXT\n")
    (tmp_path / "dmesg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    faults: list[str] = []
    _xid(faults)
    assert faults == ["the kernel reported Xid 48"]


def test_a_device_that_cannot_multiply_is_a_fault_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(device: torch.device) -> float:
        if device.index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with")
        return 700.0

    monkeypatch.setattr("launcher.checks._matmul", product)
    faults: list[str] = []
    assert _products(3, faults) == [700.0, 700.0]
    assert faults == ["cuda:1: a matrix product failed (CUDA error: uncorrectable ECC error encountered)"]


def measured(folder: Path, name: str, rank: int, nodes: int, store: str, timeout: float, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launcher.preflight", "measure", "--reports", folder, "--nodes", str(nodes), "--store", store]
    usual = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "SLURM_NODEID": str(rank), "SLURMD_NODENAME": name}
    return subprocess.Popen([*command, "--timeout", str(timeout)], cwd=ROOT, env={**usual, **environment}, stderr=subprocess.PIPE)


def judged(folder: Path, *expected: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launcher.preflight", "judge", "--reports", folder, "--expect", ",".join(expected)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_node_that_never_comes_is_the_only_one_named(tmp_path: Path) -> None:
    """Two real processes of three nodes: they go on without the third, and with each other."""
    store, folder = f"localhost:{free_port()}", tmp_path / "reports"
    nodes = [measured(folder, name, rank, 3, store, 30) for rank, name in enumerate("ab")]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    for name in "ab":
        report = json.loads((folder / f"{name}.json").read_text())
        assert report["bandwidth"] > 0 and abs(report["skew"]) < 1.0 and report["missed"] == {}
    done = judged(folder, "a", "b", "c")
    assert (done.returncode, done.stdout) == (77, "c\n"), done.stderr
    assert json.loads((tmp_path / "preflight.json").read_text())["code"] == 77
    done = judged(folder, "d", "e")
    assert done.returncode == 70 and "no node reported" in done.stderr


def test_a_measurement_that_hangs_ends_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stacks are on stderr, and the process is gone."""
    code = (
        "import sys, time, launcher.preflight as preflight\n"
        "preflight.OWN_SECONDS = 1.0\npreflight.node_report = lambda *_: time.sleep(600)\n"
        "sys.exit(preflight.main(['measure', '--reports', sys.argv[1], '--timeout', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Timeout" in done.stderr and "measure" in done.stderr


def test_two_nodes_measure_each_other(tmp_path: Path) -> None:
    """Real processes: both report a bandwidth and clocks that agree; a site's check that fails on one makes it unfit."""
    check = tmp_path / "check"
    check.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = a ] || { echo fan broken; exit 3; }\n')
    check.chmod(0o755)
    store, folder = f"localhost:{free_port()}", tmp_path / "reports"
    nodes = [measured(folder, name, rank, 2, store, 60, SWAX_NODE_CHECK=str(check)) for rank, name in enumerate("ab")]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    for name in "ab":
        report = json.loads((folder / f"{name}.json").read_text())
        assert report["bandwidth"] > 0 and abs(report["skew"]) < 1.0 and report["matmul_tflops"][0] > 0
    done = judged(folder, "a", "b")
    assert (done.returncode, done.stdout) == (77, "b\n")
    assert "preflight: a: fit (" in done.stderr and "preflight: b: SWAX_NODE_CHECK ended with 3: fan broken" in done.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("30:15", 1815), ("2:00:00", 7200), ("1-12", 129600), ("2-00:30:05", 174605), ("infinite", None)],
)
def test_times_of_slurm(text: str, seconds: int | None) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(("text", "gpus"), [("8", 8), ("h100:8", 8), ("h100:4,a100:2", 6)])
def test_gpus_as_asked_for(text: str, gpus: int) -> None:
    assert gpu_count(text) == gpus


def test_what_a_batch_script_asks_for_itself() -> None:
    script = ROOT / "slurm" / "pretrain_7b.sh"
    assert (directive(script, "time"), directive(script, "account")) == ("24:00:00", None)
    assert lead(directive(script, "signal")) == 600
    assert (lead("USR1"), lead(None)) == (60, 0)


def test_known_peaks() -> None:
    assert [known_peak(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "Tesla T4")] == [989.0, 756.0, None]


@pytest.mark.parametrize(("gres", "gpus"), [("(null)", 0), ("gpu:8", 8), ("gpu:h100:4(S:0-1),nvme:1", 4), ("gpu:a:2,gpu:b:2", 4)])
def test_gpus_of_a_node(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus


def test_a_site_file_is_read_with_its_words_where_it_fails(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text('export SWAX_SCRATCH="/local disk"\nexport SBATCH_ACCOUNT=me\n')
    found = read_site(site)
    assert (found["SWAX_SCRATCH"], found["SBATCH_ACCOUNT"]) == ("/local disk", "me")
    site.write_text("export X=$NOT_SET_ANYWHERE\n")
    assert read_site(site)["X"] == "", "many sites' scripts use what is not set"
    site.write_text("module load cuda\n")
    with pytest.raises(ValueError, match="module: command not found"):
        read_site(site)
    assert read_site(ROOT / "slurm" / "site.example.sh")["SWAX_SCRATCH"] == "/tmp"


def test_the_points_of_a_sweep(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "runs")}))
    path = tmp_path / "sweep.yaml"
    grid = {"window.windows": [[8], [8, 16]], "optimizer.learning_rate": [1e-3, 2e-3]}
    path.write_text(yaml.safe_dump({"base": str(base), "grid": grid}, sort_keys=False))
    sweep = read_sweep(path, ["train.steps=5"])
    assert len(sweep.points) == 4 and sweep.concurrent is None
    assert sweep.points[3] == [
        "train.steps=5",
        "window.windows=[8, 16]",
        "optimizer.learning_rate=0.002",
        f"run_dir={tmp_path}/runs/003_windows=8-16_learning_rate=0.002",
    ]
    assert point(f"{write_points(sweep, 'now')}:3") == sweep.points[3]
    with pytest.raises(ValueError, match="submit the sweep again"):
        point(f"{tmp_path}/runs/sweep_now.json:4")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"grid": {"a": [1]}}, "give base"),
        ({"base": "x.yaml", "grid": {}}, "at least one field"),
        ({"base": "x.yaml", "grid": {"train.steps": 5}}, "list of values"),
        ({"base": "x.yaml", "grid": {"run_dir": ["a"]}}, "grid.run_dir"),
        ({"base": "x.yaml", "grid": {"train.steps": [1]}, "concurrent": 0}, "concurrent=0"),
        ({"base": "x.yaml", "grid": {"train.steps": [1]}, "overrides": ["train.steps"]}, "overrides: must be a list"),
    ],
)
def test_a_sweep_that_is_none(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=message):
        read_sweep(path, [])
