"""Which rank is slow: the ranks' own times, compared every so many steps.

All ranks end a step together, so its duration tells nothing. A rank's own time is what it takes until it has its rows, and
what its forward passes take: backward and what follows may wait for others. Stages of a pipeline and copies of the model do not
wait in a forward pass; tensor-parallel ranks do, so a slow one makes its whole group look slow: it is reported as such. A rank
is compared with the others of its stage.
"""

from __future__ import annotations

import logging
from statistics import median_low
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from swax_megatron.callbacks.callback import Callback
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

_log = logging.getLogger(__name__)


class Stragglers(Callback):
    """Sums over the same steps on every rank: their windows are the same, so nothing needs to be kept apart by window."""

    def __init__(self) -> None:
        self.data = self.compute = 0.0
        self.steps = 0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        settings, groups = trainer.config.resilience, trainer.groups
        if not settings.straggler_interval or groups.world_size == 1:
            return
        self.data, self.compute, self.steps = self.data + result.data_wait, self.compute + result.busy, self.steps + 1
        if trainer.state.step % settings.straggler_interval:
            return
        mine = torch.tensor([self.data / self.steps, self.compute / self.steps, groups.pipeline_rank], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(groups.world_size)]
        dist.all_gather(everyone, mine, group=groups.cpu)
        times = [tuple(each[:2].tolist()) for each in everyone]
        self.data, self.compute, self.steps = 0.0, 0.0, 0
        slow, ratio = slow_ranks(times, settings.straggler_factor, [int(each[2]) for each in everyone])
        result.metrics["straggler/ratio"] = ratio
        if not slow:
            return
        seconds = {str(rank): {"data": round(times[rank][0], 4), "compute": round(times[rank][1], 4)} for rank in slow}
        trainer.record("straggler", step=result.step, ranks=seconds, ratio=round(ratio, 3))
        if groups.rank == 0:
            told = ", ".join(f"{rank} (data {times[rank][0]:.3f} s, compute {times[rank][1]:.3f} s a step)" for rank in slow[:8])
            _log.warning("step %d: slow rank(s) %s; the slowest takes %.2f x the median of its stage", result.step + 1, told, ratio)


def slow_ranks(times: list[tuple[float, float]], factor: float, stages: list[int]) -> tuple[list[int], float]:
    """Ranks whose (data + compute) seconds exceed ``factor`` x the (lower) median of their stage, slowest first; the largest ratio.

    stages: of every rank. Stages do different work: the last one has the output head.
    """
    totals, ratios = [sum(each) for each in times], {}
    for stage in set(stages):
        ranks = [rank for rank, its in enumerate(stages) if its == stage]
        middle = median_low(totals[rank] for rank in ranks)  # of two ranks the faster one
        ratios |= {rank: totals[rank] / max(middle, 1e-9) for rank in ranks}
    slow = sorted((rank for rank, ratio in ratios.items() if ratio > factor), key=lambda rank: -ratios[rank])
    return slow, max(ratios.values())
