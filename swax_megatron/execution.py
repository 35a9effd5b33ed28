"""One pass over the microbatches of a global batch through Megatron's pipeline schedule, with or without backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swax_megatron.data.packing import Batch
from swax_megatron.kernels import fp8
from swax_megatron.parallel.context import sequence_context
from swax_megatron.parallel.groups import Groups
from swax_megatron.parallel.schedule import pipeline_schedule
from swax_megatron.schema import Config


@dataclass(frozen=True)
class Pass:
    """What a pass runs on: the model chunks of this rank and the window of every layer."""

    config: Config
    groups: Groups
    chunks: list[nn.Module]
    windows: tuple[int, ...]


@dataclass(frozen=True)
class Totals:
    """Over the whole global batch, equal on every rank but for ``busy``. loss: nats per unmasked target.

    busy: this rank's seconds in forward passes. What waits for other ranks lies outside, but for collectives of a layer
    (tensor parallelism, ZeRO stage 3): backward and what follows it may reduce gradients.
    """

    loss: float
    worst_rank_loss: float
    targets: float
    busy: float = 0.0


def run_microbatches(
    job: Pass,
    batches: Sequence[Batch],
    *,
    backward: bool,
    watch: Callable[[Tensor, Batch], None] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Totals:
    """Forward (and backward) of this rank's microbatches.

    watch: on the last stage, gets (nats of every token (b, t), microbatch); meanwhile: called when all are under way, before the losses
    are read.

    The loss is the sum over tokens divided by the number of unmasked targets of the **global** batch, never a mean of
    means: rows with few targets weigh little. The schedule divides by the number of microbatches and the optimizer
    averages over data- and context-parallel ranks; both are undone here.
    """
    groups, device = job.groups, job.groups.device
    fp8.Weights.changed()
    mine = torch.stack([batch.loss_mask_bt.sum() for batch in batches]).sum()
    targets = mine.clone()
    dist.all_reduce(targets, group=groups.data)
    clock = _Clock(device)
    scale = len(batches) * groups.data_size / targets.clamp(min=1.0)

    def forward_step(iterator: object, chunk: nn.Module) -> tuple[Tensor, Callable]:
        batch: Batch = next(iterator)
        clock.start()
        output = chunk(batch.inputs_bt, sequence_context(batch, job.windows, groups.context), batch.targets_bt)
        clock.stop()

        def loss_function(losses_lbt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            if watch is not None:
                watch(losses_lbt[0], batch)
            entropy = (losses_lbt[0] * batch.loss_mask_bt).sum()
            objective = (losses_lbt.sum(0) * batch.loss_mask_bt).sum()  # with the z-loss, where it is on
            return objective * scale, {"loss": entropy.detach().clone()}  # the schedule scales the first in place

        return output, loss_function

    reports = pipeline_schedule(
        job.chunks,
        forward_step,
        batches,
        rows=job.config.train.micro_batch_size,
        sequence_length=job.config.data.sequence_length // groups.context_size,
        backward=backward,
    )
    summed = torch.stack([report["loss"] for report in reports]).sum() if reports else torch.zeros((), device=device)
    meanwhile()
    totals = _reduce(summed, mine, targets, groups, on_last_stage=bool(reports))  # reading the loss waits for the device
    return replace(totals, busy=clock.seconds())


class _Clock:
    """Adds up intervals on the CPU, or between events of a GPU's stream, which are read once the device is done with them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    stop = start  # marks come in pairs

    def seconds(self) -> float:
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(begin.elapsed_time(end) / 1000 if self._cuda else end - begin for begin, end in pairs)


def _reduce(summed: Tensor, mine: Tensor, targets: Tensor, groups: Groups, *, on_last_stage: bool) -> Totals:
    """Share the last stage's losses with every rank (one vector sum and one maximum)."""
    counted = on_last_stage and groups.tensor_rank == 0
    total = summed.detach().clone() if counted else torch.zeros_like(summed)
    worst = summed / mine.clamp(min=1.0) if on_last_stage else torch.full_like(summed, float("-inf"))
    dist.all_reduce(total)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Totals(*torch.stack([total / targets.clamp(min=1.0), worst, targets]).tolist())  # one wait for the device
