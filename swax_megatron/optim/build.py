"""From the configuration to an optimizer backend."""

from __future__ import annotations

from torch import nn

from swax_megatron.optim.backend import OptimizerBackend, mark_decay
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config


def build_optimizer(config: Config, chunks: list[nn.Module], groups: Groups) -> OptimizerBackend:
    """The backend named by optimizer.backend around the given model chunks."""
    mark_decay(chunks, config)
    if config.optimizer.backend == "zero":
        from swax_megatron.optim.zero import zero_backend  # importing DeepSpeed takes seconds

        return zero_backend(config, chunks, groups)
    from swax_megatron.optim.megatron import MegatronBackend

    return MegatronBackend(config, chunks, groups)
