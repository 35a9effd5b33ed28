"""Validation at every window of the schedule and at the test window: only then can runs with other windows be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swax_megatron.callbacks.callback import Callback
from swax_megatron.data.mixture import Mixture
from swax_megatron.execution import Pass, run_microbatches
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer


class Validation(Callback):
    """Reads the same rows every time, whatever the layout."""

    def __init__(self, data: Mixture) -> None:
        self.data = data

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval, done = trainer.config.validation.interval, trainer.state.step
        if interval and (done % interval == 0 or done == trainer.config.train.steps):
            result.metrics.update(self.losses(trainer))

    def losses(self, trainer: Trainer) -> dict[str, float]:
        """Validation loss by TensorBoard name: the test window's, and each window's."""
        config = trainer.config
        test = config.window.test_window
        batches = self._batches(trainer)
        metrics = {}
        for window in sorted({*config.window.windows, config.window.anneal_window, test}):
            job = Pass(config, trainer.groups, trainer.backend.chunks, trainer.windows.expand(window))
            with torch.no_grad():
                loss = run_microbatches(job, batches, backward=False).loss
            metrics[f"loss/validation/window_{window}"] = loss
            if window == test:
                metrics["loss/validation"] = loss
        return metrics

    def _batches(self, trainer: Trainer) -> list:
        """The validation rows, filled up with fully masked ones until every rank has equally many microbatches."""
        config, groups = trainer.config, trainer.groups
        wanted = config.validation.sequences
        plan, _ = self.data.plan(self.data.initial_state(), wanted)
        unit = config.train.micro_batch_size * groups.replicas * groups.pipeline_size
        padded = plan + plan[:1] * (-len(plan) % unit)
        batches = trainer.load_microbatches(padded, self.data)
        first_row = groups.replica * (len(padded) // groups.replicas)
        for index, batch in enumerate(batches):
            start = first_row + index * config.train.micro_batch_size
            batch.loss_mask_bt[max(0, wanted - start) :] = 0.0
        return batches
