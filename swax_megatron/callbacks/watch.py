"""Runs the watchdog beside training (``swax_megatron.resilience.watchdog``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swax_megatron.callbacks.callback import Callback
from swax_megatron.resilience.watchdog import Watchdog

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer


BEFORE_TORCH = 0.8  # share of torch's own time-out, which ends a job without a word on who is missing


class Watch(Callback):
    """From the first step to the end."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None

    def on_start(self, trainer: Trainer) -> None:
        settings = trainer.config.resilience
        if settings.hang_factor:
            ceiling = BEFORE_TORCH * trainer.config.train.distributed_timeout
            limits = (settings.hang_factor, settings.hang_minimum, settings.hang_unknown, ceiling)
            self.watchdog = Watchdog(trainer.progress, limits, trainer.config.run_dir, trainer.events)
            self.watchdog.start()

    def on_end(self, trainer: Trainer) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
