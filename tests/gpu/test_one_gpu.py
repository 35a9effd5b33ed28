"""The trainer on one GPU: one process over NCCL, and two that share the GPU over gloo (tolerances: tests/gpu/layouts.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.gpu.layouts import BOUND, MEGATRON, same, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHARED: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": {"tensor": 2, "sequence": False}},
    "TP2 SP": {"parallel": {"tensor": 2}},
    "TP2 SP, Megatron's optimizer": {"parallel": {"tensor": 2}, **MEGATRON},
    "CP2": {"parallel": {"context": 2}},
    "DP2 ZeRO-1": {},
    "DP2, Megatron's optimizer": MEGATRON,
    "DP2 ZeRO-2, reduced under way": {"optimizer": {"zero_stage": 2, "overlap_gradients": True}},
    "DP2 ZeRO-2, offloaded": {"optimizer": {"zero_stage": 2, "offload": True}},
}


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_share_a_gpu(name: str, precision: str, workers: Any, corpus: Path, tmp_path: Path, alone: Any) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("there is a GPU for every process: test_nccl.py")
    same(name, precision, workers(2).run(runs.train, settings(corpus, tmp_path, precision, **SHARED[name]))[0], alone(precision))


@pytest.mark.parametrize("precision", BOUND)
def test_the_two_optimizers_agree(precision: str, workers: Any, corpus: Path, tmp_path: Path, alone: Any) -> None:
    found = workers(1).run(runs.train, settings(corpus, tmp_path, precision, **MEGATRON))[0]
    same("Megatron's optimizer", precision, found, alone(precision))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload(stage: int, workers: Any, corpus: Path, tmp_path: Path, alone: Any) -> None:
    sections = {"optimizer": {"zero_stage": stage, "offload": True}}
    found = workers(1).run(runs.train, settings(corpus, tmp_path, "bf16", **sections))[0]
    same(f"stage {stage} offloaded", "bf16", found, alone("bf16"))


def test_training_with_the_kernels_follows_the_reference(workers: Any, corpus: Path, tmp_path: Path) -> None:
    """Packed documents, both windows, heads of a size that the Triton kernels have; bf16 rounds differently in the two."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Triton kernels are enabled on Hopper")
    model = {"hidden_size": 256, "ffn_hidden_size": 512, "mlstm_heads": 2, "norm_eps": 1e-6, "init_std": 0.02}
    found = {}
    for backend in ("auto", "reference"):
        raw = settings(corpus, tmp_path / backend, "bf16", model=model, kernels={"backend": backend}, train={"global_batch_size": 16})
        found[backend] = workers(1).run(runs.train, raw)[0]
    assert found["auto"]["loss/train"] != found["reference"]["loss/train"], "the same implementation ran twice"
    same("Triton against the reference", "bf16", found["auto"], found["reference"])
    assert found["auto"]["loss/train"][-1] < found["auto"]["loss/train"][0] - 0.3, "it learns"


def test_the_shim_is_absent(workers: Any) -> None:
    assert workers(1).run(real_cuda) == [True]


def real_cuda() -> bool:
    from swax_megatron.parallel.device import install_cpu_shim

    return install_cpu_shim() is None and torch.ones(1, device="cuda").is_cuda
