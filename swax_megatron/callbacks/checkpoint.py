"""Saves at an interval and at the end, in the background where asked; reads the newest complete checkpoint at the start."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swax_megatron.callbacks.callback import Callback
from swax_megatron.checkpoint.background import BackgroundSaver
from swax_megatron.checkpoint.compatibility import check_resume
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.remote import Remote
from swax_megatron.checkpoint.store import Checkpoint, discard_after, latest, open_checkpoint, prune, save
from swax_megatron.config import to_dict
from swax_megatron.errors import RunError
from swax_megatron.resilience.spikes import GuardState
from swax_megatron.state import StepResult, TrainState

if TYPE_CHECKING:
    from swax_megatron.schema import Config
    from swax_megatron.trainer import Trainer

_log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Checkpoints of one run directory, under ``checkpoints/step_N``, and their copies at ``checkpoint.remote``."""

    def __init__(self, run_dir: str) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.saved_step = -1
        self._saver: BackgroundSaver | None = None
        self._remote: Remote | None = None
        self._blocked = 0.0  # seconds that the newest background save made training wait
        self._copy_failed = False  # of the newest checkpoint, to the remote place

    def resume(self, trainer: Trainer) -> bool:
        """Continue from the newest complete checkpoint; False where there is none.

        Where ``checkpoint.remote`` holds a newer one (or the run directory none), it is fetched first.
        Raises ValueError before anything is changed when its configuration conflicts, a file is damaged, or
        checkpoint.resume=never meets a run directory that holds checkpoints already.
        """
        self.finish(trainer)
        groups, config = trainer.groups, trainer.config
        found = self._newest(trainer)
        if found is None:
            return False
        checkpoint = open_checkpoint(found)
        if groups.rank == 0:
            _log.info("resuming from %s", found)
        for change in check_resume(checkpoint.config, to_dict(config), config.checkpoint.allow_change, checkpoint.step):
            if groups.rank == 0:
                _log.info("resume: %s", change)
        self.load(trainer, checkpoint)
        if groups.rank == 0:
            _log.info("resumed from %s", found)
            if checkpoint.step == config.train.steps:
                _log.info("all %d steps of train.steps are done: there is nothing left to train", checkpoint.step)
        return True

    def load(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Verify a checkpoint and put the run where it stood then (a collective)."""
        config, groups = trainer.config, trainer.groups
        data = trainer.data.state_from_json(checkpoint.state["data"], allow_new="data.train" in config.checkpoint.allow_change)
        foreign = checkpoint.verify(group=groups.cpu)
        if foreign and groups.rank == 0:
            _log.warning("%s holds files that no save of ours wrote and that are not read: %s", checkpoint.path, ", ".join(foreign))
        checkpoint.read_into(trainer.backend.fragments(saving=False))
        guard = GuardState.from_json(checkpoint.state.get("guard"))
        trainer.state = TrainState(checkpoint.step, checkpoint.state["tokens_seen"], data, guard)
        trainer.backend.loaded(trainer.state.updates)
        self._restore_generators(checkpoint.rank_state(groups.rank))
        self.saved_step = checkpoint.step

    def before_update(self, trainer: Trainer) -> None:
        if self._saver is not None and self._saver.in_flight:
            started = time.perf_counter()
            self._saver.copied()
            waited = time.perf_counter() - started
            self._blocked += waited
            blocked = trainer.late_metrics.get("time/checkpoint_blocking")
            if blocked is not None:  # this step follows the save: its metrics tell the whole time
                trainer.late_metrics["time/checkpoint_blocking"] = blocked + waited

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.config.checkpoint.interval
        if interval and (trainer.state.step % interval == 0 or trainer.state.step == trainer.config.train.steps):
            if trainer.groups.device.type == "cuda":
                torch.cuda.synchronize(trainer.groups.device)  # what is still running is the step's, not the save's
            started = time.perf_counter()
            self.save(trainer, wait=not trainer.config.checkpoint.asynchronous)
            trainer.late_metrics["time/checkpoint_blocking"] = time.perf_counter() - started

    def on_end(self, trainer: Trainer) -> None:
        """A run that was told to stop saves the step it stands at, once, unless nothing was done since the last save."""
        if trainer.stop.agreed and trainer.state.step > max(0, self.saved_step):
            self.save(trainer)
        self.finish(trainer)
        if self._copy_failed and self._remote is not None:
            self._remote.upload(self.root / f"step_{self.saved_step}", Ranks.of(trainer.groups.cpu))  # once more; now it counts

    def save(self, trainer: Trainer, *, wait: bool = True) -> None:
        """Write the state after ``trainer.state.step`` updates (a collective).

        ``wait=False`` leaves it to a thread, which ``before_update`` gives the time to copy the state; what it fails with is
        raised by the next save or ``finish``. Whoever is about to leave the process waits.
        """
        state, config, group = trainer.state, trainer.config, trainer.groups.cpu
        if state.step == self.saved_step:
            if wait:
                self.finish(trainer)
            return
        trainer.progress.enter("checkpoint", state.step, "" if wait else "background")  # their usual times differ
        started = time.perf_counter()
        arguments: dict[str, Any] = {
            "config": to_dict(config),
            "state": {
                "tokens_seen": state.tokens_seen,
                "data": trainer.data.state_to_json(state.data),
                "guard": state.guard.to_json(),
                "window_schedule": f"{trainer.windows.fingerprint():016x}",
            },
            "rank_state": self._generators(),
            "group": group,
        }

        def then(path: Path, ranks: Any) -> None:
            whole = round(time.perf_counter() - started, 4)
            if wait:
                trainer.record("saved", step=state.step, seconds=whole)
            else:  # seconds: what training waited
                trainer.record("saved", step=state.step, seconds=round(self._blocked, 4), background=whole)
            self._keep(path, ranks, config)

        if wait:
            self.finish(trainer)
            path = save(self.root, state.step, trainer.backend.fragments(saving=True), **arguments)
            then(path, Ranks.of(group))
        else:
            if self._saver is None:
                self._saver = BackgroundSaver(config.train.distributed_timeout)
            self.finish(trainer)
            self._blocked = 0.0
            self._saver.start(self.root, state.step, trainer.backend.fragments(saving=True), then=then, **arguments)
            self._blocked += time.perf_counter() - started
        self.saved_step = state.step

    def finish(self, trainer: Trainer) -> None:
        """Wait for the save in flight, if there is one (a collective); raises what it failed with."""
        if self._saver is not None:
            self._saver.finish(trainer.groups.cpu)

    def discard_after(self, trainer: Trainer, step: int) -> None:
        """Delete the checkpoints of later steps here and in the remote place: a restart must not resume them (a collective)."""
        self.finish(trainer)
        discard_after(self.root, step)
        if self._remote is not None and trainer.groups.rank == 0:
            for later in sorted((found for found in self._remote.steps() if found > step), reverse=True):
                self._remote.remove(later)
        self.saved_step = -1

    def _keep(self, path: Path, ranks: Any, config: Config) -> None:
        """What follows a complete checkpoint: its copy, and retention. In the saving thread where there is one."""
        if self._remote is not None:
            try:
                self._remote.upload(path, ranks)
                self._copy_failed = False
            except RunError as error:  # the local checkpoint stands; the run ends with this error if the last copy fails
                self._copy_failed = True
                if ranks.rank == 0:
                    _log.error("%s; training goes on", error)
        if ranks.rank != 0 or not config.checkpoint.keep_last:
            return
        prune(self.root, config.checkpoint.keep_last, config.checkpoint.keep_every)
        if self._remote is not None and not self._copy_failed:
            try:
                self._remote.prune(config.checkpoint.keep_last, config.checkpoint.keep_every)
            except Exception as error:  # every kind of store has errors of its own; too many checkpoints harm nobody
                _log.warning("%s could not be pruned (%s: %s)", self._remote, type(error).__name__, error)

    def _newest(self, trainer: Trainer) -> Path | None:
        """The newest complete checkpoint, fetched where only the remote place has it; equal on every rank."""
        ranks, settings = Ranks.of(trainer.groups.cpu), trainer.config.checkpoint
        if settings.remote is not None and self._remote is None:
            self._remote = Remote(settings.remote)
        local, remote_step, failure = None, -1, None
        if ranks.rank == 0:
            local = latest(self.root)
            try:
                if self._remote is not None:
                    self._remote.check_writable()
                    remote_step = max(self._remote.steps(), default=-1)
            except Exception as error:  # every kind of store has errors of its own; raised on every rank
                failure = str(error) if isinstance(error, ValueError) else f"checkpoint.remote={settings.remote!r} cannot be read: {error}"
        local, remote_step, failure = ranks.broadcast((local, remote_step, failure))
        if failure is not None:
            raise ValueError(failure)
        local_step = -1 if local is None else open_checkpoint(local).step
        if max(local_step, remote_step) < 0:
            return None
        if settings.resume == "never":
            place, step = (self.root, local_step) if local_step >= 0 else (self._remote, remote_step)
            raise ValueError(
                f"checkpoint.resume=never, but {place} holds step_{step} of an earlier run, which would outlive the new run's "
                "checkpoints: use another run_dir, move the old one away, or set checkpoint.resume=auto"
            )
        if remote_step <= local_step:
            return local
        if ranks.rank == 0:
            _log.info("fetching step_%d from %s", remote_step, self._remote)
        return self._remote.download(remote_step, self.root, ranks)

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
