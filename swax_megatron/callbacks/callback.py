"""The hooks of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the trainer runs callbacks; callbacks only need its type
    from swax_megatron.state import Proposal, StepResult
    from swax_megatron.trainer import Trainer


class Callback:
    """Called on every rank, in the order given to the trainer. The default does nothing."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def refuses(self, trainer: Trainer, proposal: Proposal) -> bool:
        """Whether this step's gradient must not be applied; the same answer on every rank."""
        return False

    def on_rewind(self, trainer: Trainer, step: int) -> None:
        """The run stands at an earlier checkpoint again: what was done up to ``step`` counts no more from ``trainer.state.step`` on."""

    def after_rewind(self, trainer: Trainer) -> None:
        """The rewind is saved and told."""

    def before_update(self, trainer: Trainer) -> None:
        """After the backward passes of a step, before its update changes any weight."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every update; ``trainer.state.step`` is already one more than ``result.step``."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this process: ``trainer.stop.agreed`` where it was told to stop."""
