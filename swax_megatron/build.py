"""Wires a run together from its configuration: model, optimizer, data, callbacks."""

from __future__ import annotations

import torch.distributed as dist

from swax_megatron.callbacks.callback import Callback
from swax_megatron.callbacks.checkpoint import Checkpoints
from swax_megatron.callbacks.fault import Fault
from swax_megatron.callbacks.goodput import Goodput
from swax_megatron.callbacks.guard import SpikeGuard
from swax_megatron.callbacks.memory import Memory
from swax_megatron.callbacks.metrics import Metrics
from swax_megatron.callbacks.recall import Recall
from swax_megatron.callbacks.stragglers import Stragglers
from swax_megatron.callbacks.validation import Validation
from swax_megatron.callbacks.watch import Watch
from swax_megatron.model.swax import build_model
from swax_megatron.optim.build import build_optimizer
from swax_megatron.parallel.groups import Groups
from swax_megatron.resilience.events import Events
from swax_megatron.resilience.stop import StopRequest
from swax_megatron.schema import Config
from swax_megatron.sources import build_mixture, fit_cache
from swax_megatron.trainer import Trainer


def build_trainer(
    config: Config, groups: Groups, stop: StopRequest | None = None, events: Events | None = None
) -> tuple[Trainer, Checkpoints]:
    """A trainer at step 0 and its checkpoint callback, which can move it on.

    The order of callbacks matters: a validation belongs to the weights before a rewind, all that adds to the step's metrics
    comes before they are written, a step's metrics are on disk before its checkpoint is, and the end is watched to the last.
    """
    data = build_mixture(config, config.data.train, "train", config.train.data_seed)
    tokenizer = data.streams[0].dataset.tokenizer_sha256
    backend = build_optimizer(config, build_model(config, groups), groups)
    checkpoints = Checkpoints(config.run_dir)
    metrics: list[Callback] = [SpikeGuard(checkpoints), Stragglers(), Goodput(), Metrics(config.run_dir)]
    if config.monitor.memory_interval:
        metrics.insert(0, Memory())
    if config.monitor.recall_interval:
        metrics.insert(0, Recall(data.streams[0].dataset.manifest.get("recall")))
    if config.validation.interval:
        held_out = build_mixture(config, config.data.validation, "validation", config.validation.seed, tokenizer)
        fit_cache(config, [*data.streams, *held_out.streams])
        metrics.insert(0, Validation(held_out))
    callbacks = [*metrics, checkpoints, Watch()]
    if config.resilience.fault != "none":
        callbacks.append(Fault())
    return Trainer(config, groups, backend, data, callbacks, stop, _same_attempt(events, config, groups)), checkpoints


def _same_attempt(events: Events | None, config: Config, groups: Groups) -> Events:
    """The events of the attempt that rank 0 counted."""
    box = [(events or Events.of_next_attempt(config.run_dir)).attempt if groups.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, group=groups.cpu)
    return Events(config.run_dir, box[0])
