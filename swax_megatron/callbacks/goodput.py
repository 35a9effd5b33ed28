"""Tells the events file how the time was spent, and TensorBoard the run's goodput over all its restarts (rank 0)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from swax_megatron.callbacks.callback import Callback
from swax_megatron.resilience.events import read_events
from swax_megatron.resilience.goodput import CHECKPOINT, DATA, LOST, PRODUCTIVE, RESTART, account, by_kind
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

SHORTEST, SHARE, LONGEST = 0.5, 0.01, 60.0  # a progress event after 1 % of the attempt's age: few events, little unknown


class Goodput(Callback):
    """What is lost or restarted is known at the start of an attempt; the rest is added as it happens."""

    def on_start(self, trainer: Trainer) -> None:
        self.told = time.monotonic()
        self.told_seconds = dict(trainer.progress.seconds)
        self._count_anew(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.groups.rank != 0 or trainer.state.step <= result.step:
            return  # undone by a rewind
        now, interval = time.monotonic(), trainer.config.checkpoint.interval
        saves = interval and trainer.state.step % interval == 0
        due = min(LONGEST, max(SHORTEST, SHARE * (now - self.started)))
        if saves or trainer.state.step == trainer.config.train.steps or now - self.told >= due:
            self._tell(trainer, trainer.state.step)
        here = by_kind({name: seconds - self.base.get(name, 0.0) for name, seconds in trainer.progress.seconds.items()})
        wall = max(sum(self.before.values()) + now - self.started, 1e-9)
        for name, kind in (("fraction", PRODUCTIVE), ("checkpoint", CHECKPOINT), ("data_wait", DATA), ("restart", RESTART), ("lost", LOST)):
            result.metrics[f"goodput/{name}"] = (self.before.get(kind, 0.0) + here.get(kind, 0.0)) / wall

    def on_rewind(self, trainer: Trainer, step: int) -> None:
        if trainer.groups.rank == 0:
            self._tell(trainer, step + 1)

    def after_rewind(self, trainer: Trainer) -> None:
        self._count_anew(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.groups.rank == 0:
            self._tell(trainer, trainer.state.step)

    def _count_anew(self, trainer: Trainer) -> None:
        """From what the events tell up to now."""
        self.started, self.base = time.monotonic(), dict(trainer.progress.seconds)
        self.before = account(read_events(trainer.config.run_dir)).seconds if trainer.groups.rank == 0 else {}

    def _tell(self, trainer: Trainer, step: int) -> None:
        """What came since the last time, by section."""
        now = dict(trainer.progress.seconds)
        since = {name: round(now[name] - self.told_seconds.get(name, 0.0), 4) for name in now if name != "start"}
        trainer.record("progress", step=step, seconds={name: seconds for name, seconds in since.items() if seconds > 0})
        self.told, self.told_seconds = time.monotonic(), now
