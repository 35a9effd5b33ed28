"""The device of this process, and Megatron-core on the CPU.

Megatron-core names CUDA in some three hundred places. ``install_cpu_shim`` lets the same code train on the CPU: a
``TorchFunctionMode`` sends ``device="cuda"`` to the CPU, and the few ``torch.cuda`` functions that Megatron and
DeepSpeed call on a training path get CPU equivalents. It is installed once, at the program's start, and only where
CUDA is absent. ``SHIMMED`` is the complete list; a test fails on any other ``torch.cuda`` call of a training run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _Stream:
    """Stands for a CUDA stream or event: on the CPU every operation is already ordered."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> _Stream:
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


def _no_op() -> Callable[..., None]:
    """A new function each time: torch's compiler keeps a table of torch.cuda and refuses one object under two names."""
    return lambda *_, **__: None


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


# Without the generator functions losses change silently: Megatron forks the "CUDA" generator for recomputation.
SHIMMED: dict[str, Callable[..., Any]] = {
    "current_device": lambda: _CPU,
    "set_device": _no_op(),
    "synchronize": _no_op(),
    "empty_cache": _no_op(),
    "Stream": _Stream,
    "Event": type("_Event", (_Stream,), {}),
    "current_stream": lambda *_: _Stream(),
    "default_stream": lambda *_: _Stream(),
    "stream": lambda *_: contextlib.nullcontext(),
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    "manual_seed": _manual_seed,
}


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaToCpu(TorchFunctionMode):
    """Rewrites explicit CUDA devices to the CPU (about 4 microseconds an operation)."""

    pretend_cuda_types = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if self.pretend_cuda_types and func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def install_cpu_shim() -> _CudaToCpu | None:
    """Make CUDA-naming libraries run on the CPU; a no-op (None) where a GPU is present. Call once a process."""
    if torch.cuda.is_available():
        return None
    for name, replacement in SHIMMED.items():
        setattr(torch.cuda, name, replacement)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, replacement)
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _no_op(), _no_op()
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    mode = _CudaToCpu()
    mode.__enter__()
    return mode


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let ``tensor.type()`` say ``torch.cuda...`` on the CPU.

    Megatron's optimizers sort parameters by that string. Only around their calls: DeepSpeed and torch need the truth.
    """
    modes = [mode for mode in torch.overrides._get_current_function_mode_stack() if isinstance(mode, _CudaToCpu)]
    for mode in modes:
        mode.pretend_cuda_types = True
    try:
        yield
    finally:
        for mode in modes:
            mode.pretend_cuda_types = False


def select_device() -> torch.device:
    """Bind this process to its GPU by LOCAL_RANK (several processes share one where there are fewer GPUs)."""
    if not torch.cuda.is_available():
        return _CPU
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def collective_backend() -> str:
    """nccl where every local process has a GPU of its own; gloo on the CPU and where processes share a GPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return "nccl" if torch.cuda.is_available() and local <= torch.cuda.device_count() else "gloo"
