"""Tries layouts: every one that ``validate`` accepts and that fits in memory, the fastest first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.stages import stage_layers
from swax_megatron.plan.duration import Duration, duration
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.memory import Memory, fullest
from swax_megatron.plan.traffic import Cluster
from swax_megatron.schema import Config
from swax_megatron.validate import validate

USABLE = 0.9  # of a device's memory: the rest is the CUDA context, NCCL's buffers and what the allocator wastes
PIPELINES = (1, 2, 4, 8, 16)
ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, and what it costs."""

    layout: Layout
    memory: Memory
    duration: Duration

    def overrides(self) -> list[str]:
        """What to put on the command line to get it."""
        parallel, train, optimizer = self.layout.config.parallel, self.layout.config.train, self.layout.config.optimizer
        named: dict[str, Any] = {
            "parallel.tensor": parallel.tensor,
            "parallel.pipeline": parallel.pipeline,
            "parallel.virtual_pipeline": parallel.virtual_pipeline,
            "parallel.context": parallel.context,
            "train.micro_batch_size": train.micro_batch_size,
            "train.recompute": train.recompute,
            "optimizer.zero_stage": optimizer.zero_stage if optimizer.backend == "zero" else None,
        }
        return [f"{name}={value}" for name, value in named.items() if value is not None]


def proposals(config: Config, world_size: int, cluster: Cluster, count: int = 5) -> list[Proposal]:
    """The ``count`` fastest layouts of a configuration on a number of GPUs; empty where nothing fits."""
    found = []
    for candidate in _candidates(config, world_size, cluster):
        layout = Layout.of(candidate, world_size, "triton")
        _, need = fullest(layout)
        if need.total <= USABLE * cluster.gib * 2**30:
            found.append(Proposal(layout, need, duration(layout, cluster)))
    # of equals the simpler one: fewer parallel degrees, less recomputation
    found.sort(key=lambda each: (round(each.duration.total, 4), each.layout.pipeline, each.layout.tensor, each.layout.context))
    return found[:count]


def _candidates(config: Config, world_size: int, cluster: Cluster) -> Iterator[Config]:
    powers = [1 << power for power in range(world_size.bit_length())]
    for tensor in (size for size in powers if size <= cluster.gpus_per_node):
        for pipeline in PIPELINES:
            for context in powers:
                if tensor * pipeline * context > world_size or world_size % (tensor * pipeline * context):
                    continue
                for recompute in ("none", "selective", "full"):
                    for rows in ROWS:
                        for chunks in (1,) if pipeline == 1 else (1, 2):
                            for stage in _zero_stages(config, pipeline):
                                candidate = _with(config, tensor, pipeline, chunks, context, recompute, rows, stage)
                                try:
                                    validate(candidate, world_size, cuda=True)
                                except ValueError:
                                    continue
                                candidate.parallel.pipeline_layers = _balanced(candidate)
                                yield candidate


def _zero_stages(config: Config, pipeline: int) -> tuple[int, ...]:
    if config.optimizer.backend != "zero":
        return (config.optimizer.zero_stage,)
    return (1, 2, 3) if pipeline == 1 else (1,)


def _with(config: Config, tensor: int, pipeline: int, chunks: int, context: int, recompute: str, rows: int, stage: int) -> Config:
    candidate = copy.copy(config)
    candidate.parallel, candidate.train = copy.copy(config.parallel), copy.copy(config.train)
    candidate.optimizer = copy.copy(config.optimizer)
    parallel, train = candidate.parallel, candidate.train
    parallel.tensor, parallel.pipeline, parallel.context = tensor, pipeline, context
    parallel.sequence, parallel.virtual_pipeline, parallel.pipeline_layers = tensor > 1, chunks if chunks > 1 else None, None
    train.recompute, train.micro_batch_size = recompute, rows
    candidate.optimizer.zero_stage = stage
    return candidate


def _balanced(config: Config) -> list[int] | None:
    """The division of layers, computed once for all candidates that share it; None where the schedule has one part."""
    parts = config.parallel.pipeline * (config.parallel.virtual_pipeline or 1)
    if parts == 1:
        return None
    return list(_division(_Key(config), parts, config.train.recompute == "full"))


class _Key:
    """A configuration seen through what the division of layers depends on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._identity = (repr(config.model), repr(config.window), config.data.sequence_length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@lru_cache(maxsize=256)
def _division(key: _Key, parts: int, recomputed: bool) -> tuple[int, ...]:
    return tuple(stage_layers(key.config, parse_pattern(key.config.model.pattern)))
