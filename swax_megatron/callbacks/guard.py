"""Spikes and numbers that are not finite: leave the update out, go back to a checkpoint and jump over the data, stop."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from swax_megatron.callbacks.callback import Callback
from swax_megatron.callbacks.checkpoint import Checkpoints
from swax_megatron.checkpoint.folder import step_folders
from swax_megatron.checkpoint.store import open_checkpoint
from swax_megatron.errors import RunError
from swax_megatron.model.window import window_class
from swax_megatron.state import Proposal, StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

_log = logging.getLogger(__name__)


class SpikeGuard(Callback):
    """Decides on every update; all ranks decide alike (one all-reduce of an integer over gloo)."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.score = 0.0

    def refuses(self, trainer: Trainer, proposal: Proposal) -> bool:
        settings, guard = trainer.config.resilience, trainer.state.guard
        window = window_class(proposal.attention_windows)
        finite = math.isfinite(proposal.loss) and math.isfinite(proposal.grad_norm)
        self.score = guard.score(window, proposal.loss, settings.spike_minimum) if finite else 0.0
        spike = bool(settings.spike_threshold) and self.score > settings.spike_threshold
        refused = torch.tensor([spike or not finite], dtype=torch.int32)
        dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=trainer.groups.cpu)
        if not refused.item():
            trainer.state.guard = guard.accepted(window, proposal.loss, settings.spike_history)
            return False
        trainer.state.guard = guard = guard.refused(proposal.step)
        why = f"loss {proposal.loss:.4g} is {self.score:.1f} deviations above its window's" if finite else "not finite"
        trainer.record("skip", step=proposal.step, window=window, why=why, loss=str(proposal.loss), grad_norm=str(proposal.grad_norm))
        if trainer.groups.rank == 0:
            _log.warning(
                "step %d (window %s): loss %.4g, gradient norm %.4g: %s; its update is left out (%d of at most %d)",
                *(proposal.step, window, proposal.loss, proposal.grad_norm, why, guard.spent, settings.max_skips),
            )
        if guard.spent > settings.max_skips:
            raise RunError(
                f"step {proposal.step}: {guard.spent} updates were left out, more than resilience.max_skips={settings.max_skips} "
                f"(the last: {why}). Look at events.jsonl and the data of these steps; then lower optimizer.learning_rate, or raise it"
            )
        return True

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        result.metrics["spike/score"] = self.score
        result.metrics["spike/skipped"] = float(trainer.state.guard.spent)
        patience = trainer.config.resilience.spike_patience
        if patience and trainer.state.guard.streak(result.step) >= patience:
            self._rewind(trainer, result.step)

    def _rewind(self, trainer: Trainer, step: int) -> None:
        """Back to the newest checkpoint before the streak; what was read since then is jumped over.

        Later checkpoints go first and the new state is saved at once: a process killed at any moment of this resumes
        either before the rewind, and decides it again, or after it.
        """
        settings, groups, state = trainer.config.resilience, trainer.groups, trainer.state
        streak = f"step {step}: {state.guard.streak(step)} updates in a row were left out"
        if len(state.guard.rewinds) >= settings.max_rewinds:
            raise RunError(
                f"{streak} and the run went back {len(state.guard.rewinds)} times already "
                f"(resilience.max_rewinds={settings.max_rewinds}). Look at events.jsonl and the data; then lower optimizer.learning_rate"
            )
        self.checkpoints.finish(trainer)  # a save in flight may be the one to go back to
        first_bad = step + 1 - state.guard.streak(step)
        target = [self._target(state.guard.rewinds, first_bad) if groups.rank == 0 else None]
        dist.broadcast_object_list(target, src=0, group=groups.cpu)
        if target[0] is None:
            raise RunError(
                f"{streak} and no checkpoint before step {first_bad} is there to go back to. "
                "Start anew with a lower optimizer.learning_rate, or save more often (checkpoint.interval, checkpoint.keep_last)"
            )
        checkpoint = open_checkpoint(target[0])
        self.checkpoints.finish(trainer)  # what is being saved belongs to the steps that are taken back
        self.checkpoints.load(trainer, checkpoint)
        window = {"step": step, "to": checkpoint.step, "first_sample": trainer.state.data.sample, "end_sample": state.data.sample}
        trainer.state = replace(trainer.state, data=state.data, guard=trainer.state.guard.rewound(state.guard, window))
        for callback in trainer.callbacks:
            callback.on_rewind(trainer, step)
        self.checkpoints.discard_after(trainer, checkpoint.step)
        self.checkpoints.save(trainer)
        trainer.record("rewind", **window)
        if groups.rank == 0:
            _log.warning(
                "back to step %d; samples %d to %d are jumped over",
                *(checkpoint.step, window["first_sample"], window["end_sample"] - 1),
            )
        for callback in trainer.callbacks:
            callback.after_rewind(trainer)

    def _target(self, rewinds: tuple[dict[str, int], ...], first_bad: int) -> str | None:
        """The newest checkpoint at or before the first bad step; an older one where a rewind to it did not help, if there is one."""
        found = [(step, path) for step, path in step_folders(self.checkpoints.root) if step <= first_bad]
        tried = {rewind["to"] for rewind in rewinds}
        untried = [(step, path) for step, path in found if step not in tried]
        chosen = (untried or found)[-1:]  # where it is damaged, every rank refuses to open it
        return str(chosen[0][1]) if chosen else None
