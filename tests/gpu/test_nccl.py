"""The trainer over NCCL, one process a GPU, against one process on one GPU (tolerances: tests/gpu/layouts.py).

Layouts of more processes than there are GPUs are skipped. SWAX_TEST_PROCESSES=2 runs the same checks over gloo where there is no
GPU, which tests the tests.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from swax_megatron.checkpoint.store import latest, open_checkpoint
from tests import runs
from tests.faults import jobs
from tests.gpu.layouts import MEGATRON, same, settings
from tests.resume.test_resume import forget_after

pytestmark = pytest.mark.gpu

DEVICES = torch.cuda.device_count() or int(os.environ.get("SWAX_TEST_PROCESSES", "0"))
OVERLAPPED = {"overlap_gradients": True}
# name -> (processes, settings), in fp32 and bf16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 SP": (2, {"parallel": {"tensor": 2}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "DP2 ZeRO-1": (2, {}),
    "CP2": (2, {"parallel": {"context": 2}}),
    "TP2": (2, {"parallel": {"tensor": 2, "sequence": False}}),
    "DP2, Megatron's optimizer": (2, MEGATRON),
    "DP2 ZeRO-2": (2, {"optimizer": {"zero_stage": 2}}),
    "DP2 ZeRO-3": (2, {"optimizer": {"zero_stage": 3}}),
    "TP4 SP": (4, {"parallel": {"tensor": 4}}),
    "PP4": (4, {"parallel": {"pipeline": 4}}),
    "CP4": (4, {"parallel": {"context": 4}}),
    "DP4 ZeRO-1": (4, {}),
    "TP2 SP, PP2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "TP2 SP, PP2, DP2": (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "TP2 SP, CP2, DP2 ZeRO-2": (8, {"parallel": {"tensor": 2, "context": 2}, "optimizer": {"zero_stage": 2}}),
}
# in bf16 alone
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2 interleaved, Megatron's optimizer": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, **MEGATRON}),
    "TP2 SP, Megatron's optimizer": (2, {"parallel": {"tensor": 2}, **MEGATRON}),
    "CP2, Megatron's optimizer, recompute full": (2, {"parallel": {"context": 2}, "train": {"recompute": "full"}, **MEGATRON}),
    "TP2 SP, overlapped": (2, {"parallel": {"tensor": 2, "overlap": True}}),
    "TP2, overlapped": (2, {"parallel": {"tensor": 2, "sequence": False, "overlap": True}}),
    "DP2 ZeRO-1, reduced under way": (2, {"optimizer": OVERLAPPED}),
    "DP2 ZeRO-2, reduced under way": (2, {"optimizer": {"zero_stage": 2, **OVERLAPPED}}),
    "DP2 ZeRO-3, reduced under way": (2, {"optimizer": {"zero_stage": 3, **OVERLAPPED}}),
    "DP2, Megatron's optimizer, overlapped": (2, {"optimizer": {"backend": "megatron", **OVERLAPPED, "overlap_parameters": True}}),
    "DP2 ZeRO-0": (2, {"optimizer": {"zero_stage": 0}}),
    "DP2 ZeRO-1, recompute full": (2, {"train": {"recompute": "full"}}),
    "DP2 ZeRO-1, offloaded": (2, {"optimizer": {"offload": True}}),
    "DP2 ZeRO-2, offloaded": (2, {"optimizer": {"zero_stage": 2, "offload": True}}),
    "DP2 ZeRO-3, offloaded": (2, {"optimizer": {"zero_stage": 3, "offload": True}}),
}


def need(processes: int) -> None:
    if processes > DEVICES:
        pytest.skip(f"needs {processes} GPUs, one for each process (NCCL lets none share); there are {torch.cuda.device_count()}")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, precision: str, workers: Any, corpus: Path, tmp_path: Path, alone: Any) -> None:
    processes, sections = LAYOUTS[name]
    need(processes)
    same(name, precision, workers(processes).run(runs.train, settings(corpus, tmp_path, precision, **sections))[0], alone(precision))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, workers: Any, corpus: Path, tmp_path: Path, alone: Any) -> None:
    processes, sections = VARIANTS[name]
    need(processes)
    if sections.get("optimizer", {}).get("offload") and not torch.cuda.is_available():
        pytest.skip("offload to host memory needs a GPU")
    same(name, "bf16", workers(processes).run(runs.train, settings(corpus, tmp_path, "bf16", **sections))[0], alone("bf16"))


@pytest.mark.parametrize("sections", [{"parallel": {"tensor": 2}}, {"parallel": {"context": 2}}, {}], ids=["TP2 SP", "CP2", "DP2 ZeRO-1"])
def test_with_the_triton_kernels(sections: dict[str, Any], workers: Any, corpus: Path, tmp_path: Path) -> None:
    """Both windows, packed documents, heads of a size that the Triton kernels have; bf16."""
    need(2)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Triton kernels are enabled on Hopper")
    model = {"hidden_size": 256, "ffn_hidden_size": 512, "mlstm_heads": 2, "norm_eps": 1e-6, "init_std": 0.02}
    found = []
    for processes, layout in ((1, {}), (2, sections)):
        kernels, train = {"backend": "auto"}, {"global_batch_size": 16}
        raw = settings(corpus, tmp_path / str(processes), "bf16", model=model, kernels=kernels, train=train, **layout)
        found.append(workers(processes).run(runs.train, raw)[0])
    same(f"Triton, {sections or 'DP2'}", "bf16", found[1], found[0])
    assert found[1]["loss/train"][-1] < found[1]["loss/train"][0] - 0.3, "it learns"


@pytest.fixture(scope="module")
def saved(workers: Any, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 10 of a run at TP2 with sequence parallelism."""
    need(2)
    run_dir = tmp_path_factory.mktemp("saved")
    workers(2).run(runs.train, settings(corpus, run_dir, "fp32", interval=10, parallel={"tensor": 2}))
    return run_dir / "checkpoints"


@pytest.mark.parametrize("name", ["DP2 ZeRO-1", "PP2", "DP2, Megatron's optimizer", "DP2 ZeRO-3", "TP2 SP, PP2"])
def test_saved_at_tp2_continued_elsewhere(name: str, saved: Path, workers: Any, corpus: Path, tmp_path: Path, alone: Any) -> None:
    processes, sections = LAYOUTS[name]
    need(processes)
    shutil.copytree(saved, tmp_path / "checkpoints")
    forget_after(tmp_path, 10)
    found = workers(processes).run(runs.train, settings(corpus, tmp_path, "fp32", **sections))[0]
    assert found.pop("first_step") == [10]
    expected = {key: values[1 if key == "loss/validation" else 10 :] for key, values in alone("fp32").items()}
    same(f"TP2 SP -> {name}", "fp32", found, expected, factor=5)


@pytest.mark.parametrize("watchdog", [True, False], ids=["watchdog", "no watchdog"])
def test_a_killed_rank_ends_the_job(watchdog: bool, corpus: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank between two checkpoints: the job ends with its signal's code, and the newest checkpoint is whole.

    The other rank waits in a collective for ever: its watchdog ends it within two seconds, the agent after 30.
    """
    need(2)
    resilience = {} if watchdog else {"hang_factor": 0.0}
    job = jobs.Job(jobs.config(corpus, tmp_path / "run", steps=20000, interval=5, resilience=resilience), processes=2)
    job.until(lambda: list((tmp_path / "run" / "checkpoints").glob("step_*/COMPLETE")))
    killed = time.monotonic()
    os.kill(job.worker(1), signal.SIGKILL)
    code = job.ended()
    print(f"job ended {time.monotonic() - killed:.1f} s after a rank was killed, exit code {code}")
    print(job.text()[-1500:])
    assert code == 128 + signal.SIGKILL
    open_checkpoint(latest(tmp_path / "run" / "checkpoints")).verify()
