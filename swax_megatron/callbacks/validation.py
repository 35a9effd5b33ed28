"""Validation at every window of the schedule and at the test window: only then can runs with other windows be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swax_megatron.callbacks.callback import Callback
from swax_megatron.callbacks.positions import LossByPosition
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
            trainer.progress.enter("validation", result.step)
            result.metrics.update(self.losses(trainer))

    def losses(self, trainer: Trainer) -> dict[str, float]:
        """Validation loss by TensorBoard name: the test window's, also by position, and each window's.

        Nothing where the run is told to stop.

        A pass takes as many rows as a training step, so that a stop is noticed as soon as it is between steps.
        """
        config = trainer.config
        test = config.window.test_window
        batches = self._batches(trainer)
        metrics: dict[str, float] = {}
        a_step = config.train.global_batch_size // (config.train.micro_batch_size * trainer.groups.replicas)
        stages = trainer.groups.pipeline_size
        size = max(1, a_step // stages) * stages  # the interleaved schedule wants a multiple of the stages
        for window in sorted({*config.window.windows, config.window.anneal_window, test}):
            job = Pass(config, trainer.groups, trainer.backend.chunks, trainer.windows.expand(window))
            summed = targets = 0.0
            positions = LossByPosition(config.data.sequence_length, test, trainer.groups) if window == test else None
            for start in range(0, len(batches), size):
                if trainer.stop.agree(trainer.groups.cpu):
                    return {}
                with torch.no_grad():
                    part = run_microbatches(job, batches[start : start + size], backward=False, watch=positions and positions.add)
                summed, targets = summed + part.loss * part.targets, targets + part.targets
            loss = summed / max(targets, 1.0)
            metrics[f"loss/validation/window_{window}"] = loss
            if positions is not None:
                metrics |= {"loss/validation": loss, **positions.metrics()}
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
