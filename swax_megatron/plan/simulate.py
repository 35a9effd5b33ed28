"""The start of a job of any size, without its processes: who would hold what, and whether everything is held exactly once.

Groups come from Megatron's rank generator, layers from its stage arithmetic, parameters from the real model (one layer of each kind,
built here), rows from the mixture's plan and the trainer's slicing, pieces of rows from the context-parallel cut, boxes of the
optimizer's state from the geometry that checkpoints use. Only where the flat partition is cut is told again here (``_ranges``), as
DeepSpeed cuts it (a test compares the boxes with those of real processes). Megatron-core cuts every bucket of its gradient buffers for
itself: for it the whole run of parameters stands as one bucket.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from swax_megatron.checkpoint.boxes import Box, flat_range_boxes, tiling_error
from swax_megatron.data.mixture import Mixture, replica_rows
from swax_megatron.data.packing import pack
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.parallel import device
from swax_megatron.schema import Config


@dataclass(frozen=True)
class Parameter:
    """Global shape, and the dimension that tensor-parallel ranks share out (None: each holds the whole).

    decays: with weight decay or in AdamW's other group; copy: of a tied embedding, on the last stage: updated, never saved
    """

    shape: tuple[int, ...]
    shard_dim: int | None
    decays: bool = True
    copy: bool = False

    def local(self, tensor: int) -> tuple[int, ...]:
        return tuple(size // tensor if dim == self.shard_dim else size for dim, size in enumerate(self.shape))

    def origin(self, lane: int, tensor: int) -> tuple[int, ...]:
        return tuple(lane * size if dim == self.shard_dim else 0 for dim, size in enumerate(self.local(tensor)))


@dataclass(frozen=True)
class Start:
    """What was checked, in numbers."""

    ranks: int
    groups: int
    layers: int
    rows: int
    boxes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.groups} groups, {self.layers} layers, {self.rows} rows, {self.boxes} optimizer boxes in {self.seconds:.1f} s: "
            "every rank, layer, row, token and element is owned exactly once"
        )


def simulate(config: Config, world_size: int) -> Start:
    """Form and check everything. Raises ValueError naming what is missing or held twice. ``config`` must be valid for ``world_size``."""
    device.install_cpu_shim()
    from swax_megatron.parallel.groups import rank_layout

    began = time.perf_counter()
    parallel = config.parallel
    groups = rank_layout(world_size, parallel.tensor, parallel.pipeline, parallel.context)
    for kind, lists in groups.items():
        check_owned(f"ranks of the {kind} groups", [rank for group in lists for rank in group], world_size)
    place = {kind: {rank: index for group in lists for index, rank in enumerate(group)} for kind, lists in groups.items()}
    stages = _stages(config)
    check_owned("layers", [layer for chunks in stages for layers in chunks for layer in layers], len(parse_pattern(config.model.pattern)))
    rows = _check_rows(config, world_size, place)
    boxes = _check_boxes(config, world_size, place, stages)
    count = sum(len(lists) for lists in groups.values())
    layers = sum(len(layers) for chunks in stages for layers in chunks)
    return Start(world_size, count, layers, rows, boxes, time.perf_counter() - began)


def check_owned(what: str, owned: list[int], count: int) -> None:
    """ValueError unless ``owned`` holds each of 0 ... count - 1 exactly once."""
    if sorted(owned) != list(range(count)):
        missing = sorted(set(range(count)) - set(owned))
        twice = sorted({item for item in owned if owned.count(item) > 1}) if len(owned) < 100_000 else []
        raise ValueError(f"{what}: {len(owned)} are held, {count} exist; missing {missing[:5]}, held twice {twice[:5]}")


def _stages(config: Config) -> list[list[range]]:
    """Layer numbers of every stage's chunks, as Megatron slices them."""
    from swax_megatron.model.layers.specs import stage_range
    from swax_megatron.model.transformer_config import transformer_config

    megatron = transformer_config(config, SimpleNamespace(collection=None))
    chunks = config.parallel.virtual_pipeline
    return [
        [stage_range(megatron, chunk if chunks else None, stage) for chunk in range(chunks or 1)]
        for stage in range(config.parallel.pipeline)
    ]


def _check_rows(config: Config, world_size: int, place: dict[str, dict[int, int]]) -> int:
    """Every row of a global batch is read by one replica, and every token of it by one context-parallel rank of each lane and stage."""
    from swax_megatron.parallel.context import cut_rows

    parallel, length = config.parallel, config.data.sequence_length
    replicas = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    source = SimpleNamespace(sequence_length=length, dataset=SimpleNamespace(dtype=np.dtype("<u2")))
    names = [source.name for source in config.data.train]
    weights = [each.weight for each in config.data.train]
    mixture = Mixture([source] * len(names), weights, names, config.train.data_seed)
    plan, _ = mixture.plan(mixture.initial_state(), config.train.global_batch_size)
    readers: dict[int, set[int]] = {}
    for rank in range(world_size):
        readers.setdefault(place["data"][rank] // parallel.context, set()).add(rank)
    check_owned("replicas", sorted(readers), replicas)
    rows: list[tuple[int, int]] = []
    for replica in range(replicas):
        if len(readers[replica]) != world_size // replicas:
            raise ValueError(f"replica {replica} has {len(readers[replica])} ranks, not {world_size // replicas}")
        rows += replica_rows(plan, replica, replicas)
    if rows != plan or len(set(plan)) != len(plan):
        raise ValueError("the replicas' rows are not the global batch, each row once")
    ids_bt1 = torch.arange(length + 1)[None].numpy()
    batch = pack(ids_bt1, ids_bt1 >= 0, -1, config.model.document_boundary)
    held: list[int] = []
    for piece in range(parallel.context):
        ranks = SimpleNamespace(rank=piece, size=parallel.context) if parallel.context > 1 else None
        held += cut_rows(batch, ranks).inputs_bt[0].tolist()
    check_owned("tokens of a row", held, length)
    return len(rows)


def _check_boxes(config: Config, world_size: int, place: dict[str, dict[int, int]], stages: list[list[range]]) -> int:
    """Every element of every parameter's optimizer state lies on one rank (of those that save: not on tensor-parallel replicas)."""
    layers, ends = _parameters(config)
    kinds = parse_pattern(config.model.pattern)
    boxes: dict[str, list[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for _, name, parameter, box in _boxes(config, world_size, place, stages, layers, ends):
        shapes[name] = parameter.shape
        boxes.setdefault(name, []).append(box)
    expected = {f"decoder.layers.{i}.{name}" for i, kind in enumerate(kinds) for name in layers[kind]}
    expected |= set(ends["first"]) | set(ends["last"])
    if set(boxes) != expected:
        raise ValueError(f"nobody holds {sorted(expected - set(boxes))[:5]}")
    for name, found in boxes.items():
        problem = tiling_error(shapes[name], found)
        if problem is not None:
            raise ValueError(f"{name}: {problem}")
    return sum(map(len, boxes.values()))


def optimizer_boxes(config: Config, world_size: int) -> list[tuple[int, str, tuple[int, ...], tuple[int, ...]]]:
    """(rank, parameter, offsets, sizes) of every box of optimizer state that a rank would save."""
    device.install_cpu_shim()
    from swax_megatron.parallel.groups import rank_layout

    parallel = config.parallel
    groups = rank_layout(world_size, parallel.tensor, parallel.pipeline, parallel.context)
    place = {kind: {rank: index for group in lists for index, rank in enumerate(group)} for kind, lists in groups.items()}
    found = _boxes(config, world_size, place, _stages(config), *_parameters(config))
    return [(rank, name, tuple(box.offsets), tuple(box.sizes)) for rank, name, _, box in found]


def _boxes(
    config: Config,
    world_size: int,
    place: dict[str, dict[int, int]],
    stages: list[list[range]],
    layers: dict[str, dict[str, Parameter]],
    ends: dict[str, dict[str, Parameter]],
) -> Iterator[tuple[int, str, Parameter, Box]]:
    tensor = config.parallel.tensor
    kinds = parse_pattern(config.model.pattern)
    shards = max(place["data"].values()) + 1
    level = config.optimizer.zero_stage if config.optimizer.backend == "zero" else None
    ranges: dict[tuple[int, int], list[list[tuple[str, Parameter, int, int]]]] = {}
    for rank in range(world_size):
        lane, stage, shard = place["tensor"][rank], place["pipeline"][rank], place["data"][rank]
        if (lane, stage) not in ranges:
            mine = [layer for chunk in stages[stage] for layer in chunk]
            named = dict(ends["first"]) if stage == 0 else {}
            named |= {f"decoder.layers.{i}.{name}": each for i in mine for name, each in layers[kinds[i]].items()}
            if stage == len(stages) - 1:
                named |= ends["last"]
                if stage and config.model.tie_embeddings:
                    named |= {name: replace(each, copy=True) for name, each in ends["first"].items()}
            ranges[lane, stage] = _ranges(named, tensor, shards, level)
        if level == 0 and shard:
            continue  # a replica; the first one saves
        for name, parameter, start, stop in ranges[lane, stage][0 if level == 0 else shard]:
            if (parameter.shard_dim is None and lane) or parameter.copy:
                continue
            origin = parameter.origin(lane, tensor)
            for box in flat_range_boxes(parameter.local(tensor), start, stop):
                yield rank, name, parameter, box.shifted(origin)


def _ranges(named: dict[str, Parameter], tensor: int, shards: int, level: int | None) -> list[list[tuple[str, Parameter, int, int]]]:
    """For every shard (name, parameter, first, past last element). level: ZeRO's stage; None: Megatron's optimizer.

    ZeRO 1 and 2 flatten either group of AdamW (with decay, without), pad it to a multiple of 2 x shards and cut it evenly; Megatron cuts
    all parameters together; ZeRO 3 every parameter for itself; at stage 0 one shard holds all.
    """
    parts = 1 if level == 0 else shards
    found: list[list[tuple[str, Parameter, int, int]]] = [[] for _ in range(parts)]
    if level == 3:
        runs = [[name] for name in named]
    elif level is None:
        runs = [list(named)]
    else:
        runs = [[name for name, parameter in named.items() if parameter.decays == decays] for decays in (True, False)]
    padding = 1 if level in (3, None) else 2
    for run in runs:
        sizes = {name: prod(named[name].local(tensor)) for name in run}
        share = -(-sum(sizes.values()) // (padding * parts)) * padding
        position = 0
        for name, size in sizes.items():
            for part in range(position // share, min(parts, -(-(position + size) // share))):
                start, stop = max(position, part * share) - position, min(position + size, (part + 1) * share) - position
                if start < stop:
                    found[part].append((name, named[name], start, stop))
            position += size
    return found


def _parameters(config: Config) -> tuple[dict[str, dict[str, Parameter]], dict[str, dict[str, Parameter]]]:
    """Parameters of a layer by kind, and those of the first and the last stage besides, from the real model on one process."""
    from swax_megatron.model.parameters import named_global_parameters
    from swax_megatron.model.swax import SwaxModel
    from swax_megatron.model.transformer_config import transformer_config
    from swax_megatron.optim.backend import mark_decay
    from swax_megatron.parallel import groups

    kinds = "".join(sorted(set(parse_pattern(config.model.pattern))))
    small = copy.deepcopy(config)
    small.model.pattern = kinds
    small.parallel = type(config.parallel)(sequence=False)
    if dist.is_initialized():
        raise ValueError("a start is simulated outside of any distributed job")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        joined = groups.initialize(small)
        model: Any = SwaxModel(transformer_config(small, joined), small.data.sequence_length, True, True, None)
        mark_decay([model], small)
        own = _own(named_global_parameters(model))
        named = {name: Parameter(tuple(each.shape), each.shard_dim, each.decay) for name, each in own}
    finally:
        groups.shut_down()
    layers = {
        kind: {name.split(".", 3)[3]: each for name, each in named.items() if name.startswith(f"decoder.layers.{index}.")}
        for index, kind in enumerate(kinds)
    }
    first = {name: each for name, each in named.items() if name.startswith("embedding.")}
    last = {name: each for name, each in named.items() if not name.startswith(("embedding.", "decoder.layers."))}
    return layers, {"first": first, "last": last}


def _own(named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Without the last stage's copy of a tied embedding, which is never saved."""
    return ((name, parameter) for name, parameter in named if not getattr(parameter, "shared", False))
