"""The hooks of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the trainer runs callbacks; callbacks only need its type
    from swax_megatron.state import StepResult
    from swax_megatron.trainer import Trainer


class Callback:
    """Called on every rank, in the order given to the trainer. The default does nothing."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def before_update(self, trainer: Trainer) -> None:
        """After the backward passes of a step, before its update changes any weight."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every update; ``trainer.state.step`` is already one more than ``result.step``."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step."""
