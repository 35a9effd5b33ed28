"""Tries layouts: every one that ``validate`` accepts and that fits in memory, the fastest first."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.stages import stage_layers
from swax_megatron.plan.duration import Duration, duration
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.memory import Memory, fullest
from swax_megatron.plan.traffic import Cluster, heads_suffice
from swax_megatron.schema import Config
from swax_megatron.validate import validate

# Of a device's memory. The formulas count tensors; torch's allocator reserved 1.19 times as much at the peak of the 1.4B model's step on
# one H100 (benchmarks/results/plan_memory_h100.jsonl). The CUDA context and NCCL's buffers have to find room in that margin.
USABLE = 0.84
PIPELINES = (1, 2, 4, 8, 16)
ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits, and what it costs."""

    layout: Layout
    memory: Memory
    duration: Duration

    def overrides(self) -> list[str]:
        """What to put on the command line to get it, whatever the configuration file says of the layout."""
        parallel, train, optimizer = self.layout.config.parallel, self.layout.config.train, self.layout.config.optimizer
        named: dict[str, Any] = {
            "parallel.tensor": parallel.tensor,
            "parallel.pipeline": parallel.pipeline,
            "parallel.virtual_pipeline": parallel.virtual_pipeline,
            "parallel.pipeline_layers": None,  # balanced, as here
            "parallel.context": parallel.context,
            "parallel.sequence": parallel.sequence,
            "train.micro_batch_size": train.micro_batch_size,
            "train.recompute": train.recompute,
        }
        if optimizer.backend == "zero":
            named["optimizer.zero_stage"] = optimizer.zero_stage
        spelt = {None: "null", True: "true", False: "false"}
        return [f"{name}={spelt[value] if value is None or isinstance(value, bool) else value}" for name, value in named.items()]


def proposals(config: Config, world_size: int, cluster: Cluster, count: int = 5) -> list[Proposal]:
    """The ``count`` fastest layouts of a configuration on a number of GPUs; empty where nothing fits."""
    return fastest(fitting(config, world_size, cluster), cluster, count)


def fitting(config: Config, world_size: int, cluster: Cluster) -> list[tuple[Layout, Memory]]:
    """Every layout that is valid and fits, with what its fullest stage needs."""
    found = []
    for candidate in _candidates(config, world_size, cluster):
        layout = Layout.of(candidate, world_size, "triton")
        _, need = fullest(layout)
        if need.total <= USABLE * cluster.gib * 2**30:
            found.append((layout, need))
    return found


def fastest(layouts: Iterable[tuple[Layout, Memory]], cluster: Cluster, count: int, context: str = "halo") -> list[Proposal]:
    """The ``count`` fastest of them; context: how context-parallel ranks exchange (plan/duration.py)."""
    possible = (each for each in layouts if context == "halo" or heads_suffice(each[0]))
    found = [Proposal(layout, need, duration(layout, cluster, context)) for layout, need in possible]
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
    return list(_division(_Key(config), parts))


class _Key:
    """A configuration seen through what the division of layers depends on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._identity = (repr(config.model), repr(config.window), config.data.sequence_length, config.train.recompute)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@lru_cache(maxsize=256)
def _division(key: _Key, parts: int) -> tuple[int, ...]:
    return tuple(stage_layers(key.config, parse_pattern(key.config.model.pattern)))
