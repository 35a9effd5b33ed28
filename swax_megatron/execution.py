"""One pass over the microbatches of a global batch through Megatron's pipeline schedule, with or without backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swax_megatron.data.packing import Batch
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

    busy: seconds from the ranks' meeting at the start to where this rank was done with forward and backward. Ranks of one
    copy of the model wait for each other in it, copies (data parallelism) do not.
    """

    loss: float
    worst_rank_loss: float
    targets: float
    busy: float = 0.0


def run_microbatches(job: Pass, batches: Sequence[Batch], *, backward: bool) -> Totals:
    """Forward (and backward) of this rank's microbatches.

    The loss is the sum over tokens divided by the number of unmasked targets of the **global** batch, never a mean of
    means: rows with few targets weigh little. The schedule divides by the number of microbatches and the optimizer
    averages over data- and context-parallel ranks; both are undone here.
    """
    groups, device = job.groups, job.groups.device
    mine = torch.stack([batch.loss_mask_bt.sum() for batch in batches]).sum()
    targets = mine.clone()
    dist.all_reduce(targets, group=groups.data)
    started = time.perf_counter()
    scale = len(batches) * groups.data_size / targets.clamp(min=1.0)

    def forward_step(iterator: object, chunk: nn.Module) -> tuple[Tensor, Callable]:
        batch: Batch = next(iterator)
        output = chunk(batch.inputs_bt, sequence_context(batch, job.windows, groups.context), batch.targets_bt)

        def loss_function(losses_lbt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # reading the loss below waits for the same work
    busy = time.perf_counter() - started
    return replace(_reduce(summed, mine, targets, groups, on_last_stage=bool(reports)), busy=busy)


def _reduce(summed: Tensor, mine: Tensor, targets: Tensor, groups: Groups, *, on_last_stage: bool) -> Totals:
    """Share the last stage's losses with every rank (one vector sum and one maximum)."""
    counted = on_last_stage and groups.tensor_rank == 0
    total = summed.detach().clone() if counted else torch.zeros_like(summed)
    worst = summed / mine.clamp(min=1.0) if on_last_stage else torch.full_like(summed, float("-inf"))
    dist.all_reduce(total)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Totals((total / targets.clamp(min=1.0)).item(), worst.item(), targets.item())
