"""The CPU shim: complete (no other torch.cuda call on a training path) and inert where it must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.workers import free_port

# Questions about the machine; they answer truthfully without CUDA and change nothing.
HARMLESS = {
    "is_available",
    "device_count",
    "is_initialized",
    "is_current_stream_capturing",
    "is_bf16_supported",
    "_is_compiled",
    "is_in_bad_fork",
}

PROGRAM = """
import json, os, sys, types
import torch

called = set()

def recorded(name, function):
    def call(*arguments, **named):
        called.add(name)
        return function(*arguments, **named)
    return call

modules = {"": torch.cuda, "memory.": torch.cuda.memory, "random.": torch.cuda.random, "nvtx.": torch.cuda.nvtx}
ours = [
    (prefix, module, name, value)
    for prefix, module in modules.items()
    for name, value in vars(module).items()
    if isinstance(value, (types.FunctionType, type)) and value.__module__.startswith("torch.cuda")
]
classes = {value: prefix + name for prefix, _, name, value in ours if isinstance(value, type)}
for prefix, module, name, value in ours:
    if isinstance(value, types.FunctionType):
        setattr(module, name, recorded(prefix + name, value))
for value, name in classes.items():
    if type(value).__name__ == "tensortype":
        continue  # torch.cuda.FloatTensor and its like cannot be changed
    if "__new__" in vars(value):
        value.__new__ = staticmethod(recorded(name + "()", value.__new__))
    elif "__init__" in vars(value):
        value.__init__ = recorded(name + "()", value.__init__)

if __name__ == "__main__":
    from swax_megatron.train import main
    code = main(sys.argv[2:])
    with open(sys.argv[1] + "." + os.environ.get("RANK", "0"), "w") as file:
        json.dump(sorted(called), file)
    sys.exit(code)
"""


MEGATRON = {"backend": "megatron"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")
@pytest.mark.parametrize(
    ("size", "optimizer", "parallel"),
    [
        (1, {}, {}),
        (1, MEGATRON, {}),
        (2, {}, {"tensor": 2}),
        (2, {"zero_stage": 2, "overlap_gradients": True}, {}),
        (2, {"zero_stage": 3, "overlap_gradients": True}, {}),
        (2, {**MEGATRON, "overlap_gradients": True, "overlap_parameters": True}, {"pipeline": 2}),
    ],
    ids=["zero", "megatron", "zero TP2 SP", "zero 2", "zero 3", "megatron PP2"],
)
def test_no_other_cuda_call_on_a_training_path(size: int, optimizer: dict, parallel: dict, corpus: Path, tmp_path: Path) -> None:
    """Every function of torch.cuda and of its submodules, and every class when it is constructed, reports its use on every
    rank; the shim replaces its own, so what is left was not foreseen.
    """
    import yaml

    raw = runs.small_config(
        corpus,
        tmp_path / "run",
        optimizer=optimizer,
        parallel=parallel,
        train={"steps": 2, "recompute": "full", "precision": "bf16"},
        checkpoint={"interval": 1},
        validation={"interval": 1},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path.cwd())}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())] if size > 1 else []
    environment["MASTER_PORT"] = str(free_port())
    command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path / "called"), str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(size):
        called = set(json.loads((tmp_path / f"called.{rank}").read_text()))
        assert called - HARMLESS == set(), f"rank {rank}"


def test_it_rewrites_devices() -> None:
    """In a process of its own: the shim stays on for the life of one."""
    program = (
        "import torch; from swax_megatron.parallel.device import install_cpu_shim, cuda_type_names; "
        "assert torch.cuda.is_available() or install_cpu_shim(); "
        "x = torch.ones(2, device='cuda').cuda().to('cuda'); "
        "assert torch.cuda.is_available() or (x.device.type == 'cpu' and x.type() == 'torch.FloatTensor'); "
        "c = cuda_type_names(); c.__enter__(); assert x.type() == 'torch.cuda.FloatTensor'; c.__exit__(None, None, None)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
