"""The training step and the loop.

Everything optional is a callback (``swax_megatron/callbacks``). What a run carries from step to step is ``TrainState``
(and the optimizer's weights and moments); all else is a function of the configuration and the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields

import torch
import torch.distributed as dist

from swax_megatron.callbacks.callback import Callback
from swax_megatron.data.mixture import Mixture, SequenceBatch, replica_rows
from swax_megatron.data.packing import Batch, pack
from swax_megatron.errors import RunError
from swax_megatron.execution import Pass, run_microbatches
from swax_megatron.model.window import WindowSchedule, check_agreement
from swax_megatron.optim.backend import OptimizerBackend
from swax_megatron.optim.schedules import learning_rate
from swax_megatron.parallel.context import cut_rows
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config
from swax_megatron.state import StepResult, TrainState


class Trainer:
    """Drives Megatron's schedules with an optimizer backend over an exact data order."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        backend: OptimizerBackend,
        data: Mixture,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.config, self.groups, self.backend, self.data = config, groups, backend, data
        self.eos_id = data.streams[0].dataset.eos_id
        self.windows = WindowSchedule.from_config(config)
        self.state = TrainState(0, 0, data.initial_state())
        self.callbacks = list(callbacks)
        self.window_check_due = True  # the first step of a process is always checked
        self.late_metrics: dict[str, float] = {}  # measured after a step's metrics were written: told with the next step's

    def fit(self) -> None:
        """Train to the configured number of steps."""
        for callback in self.callbacks:
            callback.on_start(self)
        while self.state.step < self.config.train.steps:
            result = self.train_step()
            for callback in self.callbacks:
                callback.after_step(self, result)
        for callback in self.callbacks:
            callback.on_end(self)

    def train_step(self) -> StepResult:
        """One optimizer update on one global batch."""
        started = time.perf_counter()
        step, train = self.state.step, self.config.train
        windows = self.windows.layers(step)
        self._check_windows(step, windows)

        plan, data = self.data.plan(self.state.data, train.global_batch_size)
        batches = self.load_microbatches(plan)
        waited = time.perf_counter() - started

        self.backend.zero_grad()
        totals = run_microbatches(Pass(self.config, self.groups, self.backend.chunks, windows), batches, backward=True)
        rate = learning_rate(self.config, step, self.state.tokens_seen)
        for callback in self.callbacks:
            callback.before_update(self)
        grad_norm = self.backend.step(rate)
        if not torch.isfinite(torch.tensor([totals.loss, grad_norm])).all():
            raise RunError(
                f"step {step}: loss {totals.loss} and gradient norm {grad_norm} are not both finite; nothing of this step is saved. "
                "Resume from the last checkpoint with a lower optimizer.learning_rate, or inspect the data of this step"
            )
        tokens = train.global_batch_size * self.config.data.sequence_length
        self.state = TrainState(step + 1, self.state.tokens_seen + tokens, data)
        if self.groups.device.type == "cuda":
            torch.cuda.synchronize(self.groups.device)  # the update and the gathering of weights belong to this step
        seconds = time.perf_counter() - started
        seen = self.windows.attention_windows(step)
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
        }
        metrics |= self.late_metrics
        self.late_metrics = {}
        return StepResult(step, windows, seen, seconds, tokens, metrics)

    def load_microbatches(self, plan: list, data: Mixture | None = None) -> list[Batch]:
        """This replica's rows of a global batch, cut into microbatches on the device; under context parallelism its piece of them.

        Rows are dealt out contiguously. Every tensor-, pipeline- and context-parallel rank reads the same rows itself: they
        are a pure function of the plan, so nothing is broadcast and every rank knows all document boundaries.
        """
        size = self.config.train.micro_batch_size
        mine = replica_rows(plan, self.groups.replica, self.groups.replicas)
        source = data or self.data
        return [self._pack(source.load(mine[start : start + size])) for start in range(0, len(mine), size)]

    def _pack(self, rows: SequenceBatch) -> Batch:
        batch = cut_rows(pack(rows.ids_bt1, rows.mask_bt1, self.eos_id, self.config.model.document_boundary), self.groups.context)
        return Batch(**{item.name: getattr(batch, item.name).to(self.groups.device) for item in fields(batch)})

    def _check_windows(self, step: int, windows: tuple[int, ...]) -> None:
        interval = self.config.window.check_interval
        if interval and (self.window_check_due or step % interval == 0):
            check_agreement(windows, self.windows.fingerprint(), step, dist.group.WORLD, self.groups.device)
            self.window_check_due = False
