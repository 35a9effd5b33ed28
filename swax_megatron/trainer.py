"""The training step and the loop.

Everything optional is a callback (``swax_megatron/callbacks``). What a run carries from step to step is ``TrainState``
(and the optimizer's weights and moments); all else is a function of the configuration and the step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from swax_megatron.batching import batch_rows
from swax_megatron.callbacks.callback import Callback
from swax_megatron.data.mixture import Mixture
from swax_megatron.data.packing import Batch
from swax_megatron.execution import Pass, run_microbatches
from swax_megatron.feed import Feed
from swax_megatron.model.window import WindowSchedule, check_agreement, window_class
from swax_megatron.optim.backend import OptimizerBackend
from swax_megatron.optim.schedules import learning_rate
from swax_megatron.parallel.groups import Groups
from swax_megatron.resilience.events import Events
from swax_megatron.resilience.progress import OVER, Progress
from swax_megatron.resilience.stop import StopRequest
from swax_megatron.schema import Config
from swax_megatron.state import Proposal, StepResult, TrainState


def spare_collector() -> None:
    """Python's garbage collector need not look through the model and the libraries again and again: it would stop a step for as long."""
    gc.collect()
    gc.freeze()


class Trainer:
    """Drives Megatron's schedules with an optimizer backend over an exact data order."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        backend: OptimizerBackend,
        data: Mixture,
        callbacks: Iterable[Callback] = (),
        stop: StopRequest | None = None,
        events: Events | None = None,
    ) -> None:
        self.config, self.groups, self.backend, self.data = config, groups, backend, data
        self.feed = Feed(config, groups, data)
        self.windows = WindowSchedule.from_config(config)
        self.state = TrainState(0, 0, data.initial_state())
        self.callbacks = list(callbacks)
        self.stop = stop or StopRequest(config.run_dir)
        self.events = events or Events.of_next_attempt(config.run_dir)
        self.progress = Progress()
        self.window_check_due = True  # the first step of a process is always checked
        self.late_metrics: dict[str, float] = {}  # measured after a step's metrics were written: told with the next step's

    def fit(self) -> None:
        """Train to the configured number of steps, or to the step at which all ranks agree to stop."""
        try:
            self._fit()
        finally:
            gc.unfreeze()
            self.progress.enter(OVER, self.state.step)
            self.feed.close()
            self.backend.close()

    def _fit(self) -> None:
        spare_collector()
        self.record("resume", step=self.state.step)
        for callback in self.callbacks:
            callback.on_start(self)
        while self.state.step < self.config.train.steps and not self.stop.agree(self.groups.cpu):
            result = self.train_step()
            for callback in self.callbacks:
                self.progress.enter("callbacks", result.step)
                callback.after_step(self, result)
            self.progress.enter("agreement", result.step)
        self.progress.enter("end", self.state.step)
        if self.stop.agreed:
            self.record("signal", reason=self.stop.reason, step=self.state.step)
        for callback in self.callbacks:
            callback.on_end(self)
        if self.stop.agreed:
            self.stop.finish(self.groups.cpu)

    def record(self, event: str, **fields: Any) -> None:
        """Tell an event of the run (rank 0)."""
        if self.groups.rank == 0:
            self.events.write(event, **fields)

    def train_step(self) -> StepResult:
        """One optimizer update on one global batch."""
        started = time.perf_counter()
        step = self.state.step
        windows = self.windows.layers(step)
        size = window_class(self.windows.attention_windows(step))
        self.progress.enter("data", step, size)
        self._check_windows(step, windows)

        batches, data, tokens = self.feed.take(self.state.data, step)
        waited = time.perf_counter() - started

        self.progress.enter("compute", step, size)
        self.backend.zero_grad(len(batches))
        job = Pass(self.config, self.groups, self.backend.chunks, windows)
        totals = run_microbatches(job, batches, backward=True, meanwhile=self.backend.begin_reduce)
        rate = learning_rate(self.config, step, self.state.tokens_seen)
        self.progress.enter("update", step, size)
        grad_norm = self.backend.reduce()
        seen = self.windows.attention_windows(step)
        proposal = Proposal(step, seen, totals.loss, grad_norm)
        if any([callback.refuses(self, proposal) for callback in self.callbacks]):  # every callback looks: refusals may be collective
            self.backend.discard()
        else:
            for callback in self.callbacks:
                callback.before_update(self)
            self.backend.update(rate)
        self.state = TrainState(step + 1, self.state.tokens_seen + tokens, data, self.state.guard)
        # a GPU's update runs on while the next step is prepared, and counts to that step's time: reading its loss waits for all
        seconds = time.perf_counter() - started
        metrics = {
            "loss/train": totals.loss,
            "loss/max_over_ranks": totals.worst_rank_loss,
            "optim/grad_norm": grad_norm,
            "optim/learning_rate": rate,
            "window/size": sum(seen) / len(seen),
            "time/step": seconds,
            "time/data_wait_fraction": waited / seconds,
            "data/tokens_seen": float(self.state.tokens_seen),
            "data/targets": totals.targets,
            "data/batch_rows": float(batch_rows(self.config, step)),
            "data/padding_fraction": 1.0 - tokens / (batch_rows(self.config, step) * self.config.data.sequence_length),
            **{f"data/epoch/{name}": epochs for name, epochs in self.data.epochs(data).items()},
        }
        metrics |= self.late_metrics
        self.late_metrics = {}
        return StepResult(step, windows, seen, seconds, tokens, metrics, waited, totals.busy)

    def load_microbatches(self, plan: list, data: Mixture | None = None) -> list[Batch]:
        """This rank's rows of a global batch, cut into microbatches on the device; read now."""
        return self.feed.read(plan, data or self.data)

    def _check_windows(self, step: int, windows: tuple[int, ...]) -> None:
        interval = self.config.window.check_interval
        if interval and (self.window_check_due or step % interval == 0):
            check_agreement(windows, self.windows.fingerprint(), step, dist.group.WORLD, self.groups.device)
            self.window_check_due = False
