"""Learning rate as a pure function of the progress of a run."""

from __future__ import annotations

import math

from swax_megatron.batching import batch_rows, rows_before
from swax_megatron.schema import Config


def learning_rate(config: Config, step: int, tokens_seen: int) -> float:
    """The learning rate of the update at ``step`` (0-based), before which ``tokens_seen`` tokens were read.

    Linear warm-up from the first update on; then cosine to the minimum, or constant with a linear decay over the
    last ``decay_fraction`` (WSD, Hu et al. 2024). Measured in steps, or in tokens where rows may be padded.
    """
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.schedule_unit == "tokens":
        tokens_a_step = batch_rows(config, step) * config.data.sequence_length
        done, total = tokens_seen / tokens_a_step, rows_before(config, steps) / batch_rows(config, step)
        warmup = optimizer.warmup / tokens_a_step
    else:
        done, total, warmup = float(step), float(steps), float(optimizer.warmup)
    peak, low = optimizer.learning_rate, optimizer.min_learning_rate
    if done + 1 < warmup:
        return peak * (done + 1) / warmup
    if optimizer.schedule == "cosine":
        progress = min(1.0, (done - warmup) / max(total - warmup, 1.0)) if done > warmup else 0.0
        return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_start = (1.0 - optimizer.decay_fraction) * total
    if done < decay_start:
        return peak
    return low + (peak - low) * max(0.0, (total - done) / (total - decay_start))
