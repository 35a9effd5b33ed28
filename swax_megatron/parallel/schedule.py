"""Megatron's forward-backward schedules (no pipeline, 1F1B, interleaved) behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import nn


def pipeline_schedule(
    chunks: Sequence[nn.Module],
    forward_step: Callable,
    batches: Sequence[Any],
    *,
    rows: int,
    sequence_length: int,
    backward: bool,
) -> list[dict]:
    """Run every microbatch through this rank's chunks; the reports of the loss function (last stage only).

    forward_step(iterator, chunk) -> (output, loss function), as Megatron's schedules want it.
    """
    iterators: Any = [iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches)
    for chunk in chunks:
        if chunk.training is not backward:  # visits every module
            chunk.train(backward)
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators,
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=rows,
        forward_only=not backward,
    )
    for chunk in chunks:
        # Megatron would keep the neighbour's last hidden states, and their gradient, till the next step
        get_attr_wrapped_model(chunk, "set_input_tensor")(None)
    return reports
