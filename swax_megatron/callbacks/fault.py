"""The fault injector: one fault, on one rank, at one step, once in a run's life (``resilience.fault``; off by default)."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swax_megatron.callbacks.callback import Callback
from swax_megatron.callbacks.checkpoint import Checkpoints
from swax_megatron.checkpoint.store import latest
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

SMALL = 4096  # bytes that a "full disk" still takes


class Fault(Callback):
    """Strikes inside the forward pass of the step, where the other ranks will wait for this one.

    kill, segfault, stop, sigterm: the signal to itself    gil: hold the interpreter's lock    sleep: stand still
    exception: raise    slow: sleep in every step    nan: a gradient    spike: tenfold token losses
    disk_full: no file of this process may grow any more    corrupt: a byte of the checkpoint just saved, then kill
    """

    def on_start(self, trainer: Trainer) -> None:
        self.settings = trainer.config.resilience
        self.marks = Path(trainer.config.run_dir) / "faults"
        if trainer.groups.rank != self.settings.fault_rank:
            return
        chunks = trainer.backend.chunks
        chunks[0].register_forward_pre_hook(lambda *_: self._strike(trainer))
        if self.settings.fault == "spike":
            chunks[-1].register_forward_hook(lambda _, __, output: 10.0 * output if self.strikes_now(trainer) else output)
        if self.settings.fault == "nan":
            parameter = next(p for chunk in chunks for p in chunk.parameters())
            parameter.register_hook(lambda gradient: gradient * float("nan") if self.active(trainer) else gradient)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.settings.fault != "corrupt" or trainer.state.step != self.settings.fault_step:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoints):
                callback.finish(trainer)  # on every rank: the save may be in the background
        if trainer.groups.rank == self.settings.fault_rank and self._first(trainer.state.step):
            checkpoint = latest(Path(trainer.config.run_dir) / "checkpoints")
            victim = max(checkpoint.glob("rank_*.safetensors"), key=lambda path: path.stat().st_size)
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
            os.kill(os.getpid(), signal.SIGKILL)

    def active(self, trainer: Trainer) -> bool:
        """Whether the step that runs is one of the fault's, for the first time (a rewind does a step's number again)."""
        step, settings = trainer.state.step, self.settings
        inside = settings.fault_step <= step < settings.fault_step + settings.fault_steps
        return inside and not (trainer.state.guard.rewinds and settings.fault in ("nan", "spike"))

    def strikes_now(self, trainer: Trainer) -> bool:
        """Inside a forward pass of training: validation has no gradients."""
        return torch.is_grad_enabled() and self.active(trainer)

    def _strike(self, trainer: Trainer) -> None:
        if not self.strikes_now(trainer):
            return
        kind, seconds = self.settings.fault, self.settings.fault_seconds
        if kind == "slow":
            time.sleep(seconds)
        signals: dict[str, Any] = {"kill": signal.SIGKILL, "segfault": signal.SIGSEGV, "stop": signal.SIGSTOP, "sigterm": signal.SIGTERM}
        if kind in ("slow", "nan", "spike", "corrupt") or not self._first(trainer.state.step):
            return
        if kind in signals:
            os.kill(os.getpid(), signals[kind])
        elif kind == "gil":
            _hold_interpreter(seconds)
        elif kind == "sleep":
            time.sleep(seconds)
        elif kind == "exception":
            raise RuntimeError(f"injected at step {trainer.state.step}")
        elif kind == "disk_full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def _first(self, step: int) -> bool:
        """Leave a mark before striking: a restarted run is spared."""
        self.marks.mkdir(parents=True, exist_ok=True)
        try:
            (self.marks / f"{self.settings.fault}_rank_{self.settings.fault_rank}_step_{step}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _hold_interpreter(seconds: float) -> None:
    """Wait in a C function with the interpreter's lock held; unlike a sleep, no signal ends a wait for a mutex."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)  # zeros: an open mutex
    until = (ctypes.c_long * 2)(int(time.time() + seconds), 0)  # a timespec
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_timedlock(mutex, until)
