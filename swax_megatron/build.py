"""Wires a run together from its configuration: model, optimizer, data, callbacks."""

from __future__ import annotations

from swax_megatron.callbacks.checkpoint import Checkpoints
from swax_megatron.callbacks.metrics import Metrics
from swax_megatron.callbacks.validation import Validation
from swax_megatron.model.swax import build_model
from swax_megatron.optim.build import build_optimizer
from swax_megatron.parallel.groups import Groups
from swax_megatron.resilience.events import Events
from swax_megatron.resilience.stop import StopRequest
from swax_megatron.schema import Config
from swax_megatron.sources import build_mixture
from swax_megatron.trainer import Trainer


def build_trainer(
    config: Config, groups: Groups, stop: StopRequest | None = None, events: Events | None = None
) -> tuple[Trainer, Checkpoints]:
    """A trainer at step 0 and its checkpoint callback, which can move it on.

    The order of callbacks matters: validation adds to the step's metrics before they are written, and a step's metrics
    are on disk before its checkpoint is.
    """
    data = build_mixture(config, config.data.train, "train", config.train.data_seed)
    tokenizer = data.streams[0].dataset.tokenizer_sha256
    backend = build_optimizer(config, build_model(config, groups), groups)
    checkpoints = Checkpoints(config.run_dir)
    callbacks = [Metrics(config.run_dir), checkpoints]
    if config.validation.interval:
        callbacks.insert(0, Validation(build_mixture(config, config.data.validation, "validation", config.validation.seed, tokenizer)))
    return Trainer(config, groups, backend, data, callbacks, stop, events), checkpoints
