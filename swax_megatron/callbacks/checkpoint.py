"""Saves at an interval and at the end; reads the newest complete checkpoint at the start."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from swax_megatron.callbacks.callback import Callback
from swax_megatron.checkpoint.compatibility import check_resume
from swax_megatron.checkpoint.store import Checkpoint, latest, open_checkpoint, prune, save
from swax_megatron.config import to_dict
from swax_megatron.resilience.spikes import GuardState
from swax_megatron.state import StepResult, TrainState

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

_log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Checkpoints of one run directory, under ``checkpoints/step_N``."""

    def __init__(self, run_dir: str) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.saved_step = -1

    def resume(self, trainer: Trainer) -> bool:
        """Continue from the newest complete checkpoint; False where there is none.

        Raises ValueError before anything is changed when its configuration conflicts, a file is damaged, or
        checkpoint.resume=never meets a run directory that holds checkpoints already.
        """
        groups, config = trainer.groups, trainer.config
        found = [latest(self.root) if groups.rank == 0 else None]
        torch.distributed.broadcast_object_list(found, src=0, group=groups.cpu)
        if found[0] is None:
            return False
        if config.checkpoint.resume == "never":
            raise ValueError(
                f"checkpoint.resume=never, but {self.root} holds {found[0].name} of an earlier run, which would outlive the new run's "
                "checkpoints: use another run_dir, move the old one away, or set checkpoint.resume=auto"
            )
        checkpoint = open_checkpoint(found[0])
        for change in check_resume(checkpoint.config, to_dict(config), config.checkpoint.allow_change, checkpoint.step):
            if groups.rank == 0:
                _log.info("resume: %s", change)
        self.load(trainer, checkpoint)
        if groups.rank == 0:
            _log.info("resumed from %s", found[0])
            if checkpoint.step == config.train.steps:
                _log.info("all %d steps of train.steps are done: there is nothing left to train", checkpoint.step)
        return True

    def load(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Verify a checkpoint and put the run where it stood then (a collective)."""
        config, groups = trainer.config, trainer.groups
        data = trainer.data.state_from_json(checkpoint.state["data"], allow_new="data.train" in config.checkpoint.allow_change)
        checkpoint.verify(group=groups.cpu)
        checkpoint.read_into(trainer.backend.fragments(saving=False))
        guard = GuardState.from_json(checkpoint.state.get("guard"))
        trainer.state = TrainState(checkpoint.step, checkpoint.state["tokens_seen"], data, guard)
        trainer.backend.loaded(trainer.state.updates)
        self._restore_generators(checkpoint.rank_state(groups.rank))
        self.saved_step = checkpoint.step

    def on_end(self, trainer: Trainer) -> None:
        """A run that was told to stop saves the step it stands at, once, unless nothing was done since the last save."""
        if trainer.stop.agreed and trainer.state.step > max(0, self.saved_step):
            self.save(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.config.checkpoint.interval
        if interval and (trainer.state.step % interval == 0 or trainer.state.step == trainer.config.train.steps):
            if trainer.groups.device.type == "cuda":
                torch.cuda.synchronize(trainer.groups.device)  # what is still running is the step's, not the save's
            started = time.perf_counter()
            self.save(trainer)
            trainer.late_metrics["time/checkpoint_blocking"] = time.perf_counter() - started

    def save(self, trainer: Trainer) -> None:
        """Write the state after ``trainer.state.step`` updates (a collective)."""
        state, config = trainer.state, trainer.config
        if state.step == self.saved_step:
            return
        trainer.progress.enter("checkpoint", state.step)
        started = time.perf_counter()
        save(
            self.root,
            state.step,
            trainer.backend.fragments(saving=True),
            config=to_dict(config),
            state={
                "tokens_seen": state.tokens_seen,
                "data": trainer.data.state_to_json(state.data),
                "guard": state.guard.to_json(),
                "window_schedule": f"{trainer.windows.fingerprint():016x}",
            },
            rank_state=self._generators(),
            group=trainer.groups.cpu,
        )
        self.saved_step = state.step
        trainer.record("saved", step=state.step, seconds=round(time.perf_counter() - started, 4))
        if trainer.groups.rank == 0 and config.checkpoint.keep_last:
            prune(self.root, config.checkpoint.keep_last)

    @staticmethod
    def _generators() -> dict[str, torch.Tensor]:
        states = {"cpu_generator": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda_generator"] = torch.cuda.get_rng_state()
        return states

    @staticmethod
    def _restore_generators(states: dict[str, torch.Tensor] | None) -> None:
        """Nothing of ours draws from them; a rank that did not exist before keeps its fresh ones."""
        if states:
            torch.set_rng_state(states["cpu_generator"])
            if torch.cuda.is_available() and "cuda_generator" in states:
                torch.cuda.set_rng_state(states["cuda_generator"])
