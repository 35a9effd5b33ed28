"""The expected time of a step: operations at a share of the peak, bytes over links, the pipeline's bubble.

Assumptions: every layer computes at ``Cluster.efficiency`` of the peak; tensor, pipeline and context transfers are not overlapped with
computation, the data-parallel ones only where optimizer.overlap_* asks for it (half of a backward pass hides gradients, a forward pass
hides gathers); ranks lie as Megatron orders them: tensor fastest, then context and data, then pipeline. Of context-parallel ranks the last
sets the pace: its queries see the most keys.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from swax_megatron.model.cost import COSTS, training_flops
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.stages import head_passes
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.traffic import Cluster, context_bytes, gradient_bytes, heads_suffice, pipeline_bytes, tensor_bytes, weight_bytes


@dataclass(frozen=True)
class Duration:
    """Seconds of a step and what they consist of; mean over the windows of the run."""

    compute: float
    tensor: float
    pipeline: float
    context: float
    data: float  # what is not hidden
    bubble: float  # share of compute, tensor, pipeline and context time in which the slowest stage waits
    total: float
    tokens_per_second: float
    mfu: float  # model operations (no recomputation) over the peak


def duration(layout: Layout, cluster: Cluster, context: str = "halo") -> Duration:
    """Of the whole job: the slowest stage sets the pace of all.

    context: "halo", as the runs do (neighbours' keys and memories; full attention's whole row); "all_to_all": what it would take if
    context-parallel ranks exchanged sequence for heads and back. Raises ValueError where there are not heads enough for that.
    """
    if context not in ("halo", "all_to_all"):
        raise ValueError(f"context={context!r}: use 'halo' or 'all_to_all'")
    if context == "all_to_all" and not heads_suffice(layout):
        model = layout.config.model
        raise ValueError(
            f"context='all_to_all': parallel.tensor={layout.tensor} x parallel.context={layout.context} ranks need heads of their own, and "
            f"model.mlstm_heads={model.mlstm_heads}, model.attention_heads={model.attention_heads}, "
            f"model.attention_kv_heads={model.attention_kv_heads}; use fewer ranks or context='halo'"
        )
    found = [(share, _step(layout, cluster, window, context)) for share, window in layout.windows()]
    mean = [sum(share * parts[index] for share, parts in found) for index in range(6)]
    compute, tensor, pipeline, exchange, data, total = mean
    config = layout.config
    tokens = config.train.global_batch_size * config.data.sequence_length
    kinds = parse_pattern(config.model.pattern)
    flops = sum(share * training_flops(config.model, config.data.sequence_length, [w] * len(kinds)) for share, w in layout.windows())
    mfu = flops * tokens / (total * layout.world_size * cluster.peak_tflops * 1e12)
    return Duration(compute, tensor, pipeline, exchange, data, bubble(layout), total, tokens / total, mfu)


def bubble(layout: Layout) -> float:
    """Idle slots over all slots: (p - 1) / (v m + p - 1) (Narayanan et al. 2021)."""
    idle = layout.pipeline - 1
    return idle / (layout.chunks * layout.microbatches + idle)


def _step(layout: Layout, cluster: Cluster, window: int, how: str) -> tuple[float, ...]:
    """compute, tensor, pipeline, context, data and total seconds at one window."""
    tensor_link = cluster.bandwidth(layout.tensor)
    context_link = cluster.bandwidth(layout.tensor * layout.context)
    data_link = cluster.bandwidth(layout.tensor * layout.shards)
    pipe_link = cluster.bandwidth(layout.tensor * layout.shards * layout.pipeline)
    slots = layout.microbatches / (1.0 - bubble(layout))
    worst: tuple[float, ...] = (0.0,) * 6
    for stage in range(layout.pipeline):
        layers = sum(len(chunk) for chunk in layout.stage(stage))
        compute = _seconds(layout, cluster, stage, window, how)
        messages = layers * 8 * cluster.latency if layout.tensor > 1 else 0.0
        tensor = tensor_bytes(layout, stage) / tensor_link + messages
        pipeline = pipeline_bytes(layout, stage) / pipe_link + 2 * layout.chunks * cluster.latency * (layout.pipeline > 1)
        rounds = (layout.context - 1).bit_length() * 2 * layers * cluster.latency
        context = context_bytes(layout, stage, window, how) / context_link + rounds
        data = _exposed(layout, gradient_bytes(layout, stage) / data_link, weight_bytes(layout, stage) / data_link, compute)
        total = slots * (compute + tensor + pipeline + context) + data
        if total > worst[-1]:
            busy = layout.microbatches
            worst = (busy * compute, busy * tensor, busy * pipeline, busy * context, data, total)
    return worst


def _seconds(layout: Layout, cluster: Cluster, stage: int, window: int, how: str) -> float:
    """Forward and backward of one micro-batch on the slowest rank of a stage, what is recomputed included."""
    model = layout.config.model
    passes = {"none": 3.0, "selective": 3.0, "full": 4.0}[layout.config.train.recompute]
    again = 1.0 if layout.config.train.recompute == "selective" else 0.0
    flops = 0.0
    for kind, count in Counter("".join(layout.stage(stage))).items():
        core = core_flops(layout, kind, window, how)
        outside = COSTS[kind].projection_flops(model) + 6.0 * model.hidden_size * model.ffn_hidden_size
        flops += count * (passes * (core + outside) + again * core)
    if stage == layout.pipeline - 1:
        flops += head_passes(layout.config) * 2.0 * model.hidden_size * model.vocab_size
    return flops * layout.tokens / layout.tensor / (cluster.peak_tflops * 1e12 * cluster.efficiency)


def core_flops(layout: Layout, kind: str, window: int, how: str) -> float:
    """Forward operations a token of a mixer on the last context-parallel rank: its piece is the row without all before it.

    Full attention does (2P - 1) / P of the mean there. Heads, exchanged for the sequence, are all alike.
    """
    model, length = layout.config.model, layout.config.data.sequence_length
    whole = COSTS[kind].core_flops(model, length, window)
    if layout.context == 1 or how == "all_to_all":
        return whole
    before = length - layout.piece
    return (length * whole - before * COSTS[kind].core_flops(model, before, window)) / layout.piece


def _exposed(layout: Layout, gradients: float, weights: float, compute: float) -> float:
    """Seconds of the data-parallel transfers that computation does not hide. gradients, weights: seconds they take."""
    settings = layout.config.optimizer
    level = settings.zero_stage if settings.backend == "zero" else 1
    passes = layout.microbatches if level >= 2 else 1
    if level == 3:
        weights -= min(weights, passes * compute / 2)  # DeepSpeed gathers the next module's weights ahead
    if settings.overlap_gradients:
        gradients -= min(gradients, passes * compute / 2)
    if settings.overlap_parameters:
        weights -= min(weights, compute / 3)
    return gradients + weights
