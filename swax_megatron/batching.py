"""How many rows each update has: the batch size of a step, and sums of it, as pure functions of the configuration."""

from __future__ import annotations

from swax_megatron.schema import Config


def batch_rows(config: Config, step: int) -> int:
    """Rows of the update at ``step`` (0-based) over all ranks."""
    for phase in config.train.batch_ramp:
        if step < phase.until_step:
            return phase.rows
    return config.train.global_batch_size


def rows_before(config: Config, step: int) -> int:
    """Rows of all updates before ``step``."""
    rows = first = 0
    for phase in config.train.batch_ramp:
        last = min(step, phase.until_step)
        rows += max(0, last - first) * phase.rows
        first = max(first, last)
    return rows + (step - first) * config.train.global_batch_size


def batch_sizes(config: Config) -> list[tuple[str, int]]:
    """Every batch size of the run with the field that gives it."""
    ramp = [(f"train.batch_ramp.{index}.rows", phase.rows) for index, phase in enumerate(config.train.batch_ramp)]
    return [*ramp, ("train.global_batch_size", config.train.global_batch_size)]
