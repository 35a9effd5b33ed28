"""Bytes that the busiest rank sends in one step, by kind. Collectives are counted as rings: a reduction or a gather over n ranks
sends (n - 1) / n of the whole, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from swax_megatron.model.cost import COSTS
from swax_megatron.plan.layout import Layout


@dataclass(frozen=True)
class Cluster:
    """Machines and links. Bytes a second that one GPU sends, as reached in practice; seconds that a message waits."""

    gpus_per_node: int = 8
    gib: float = 80.0
    peak_tflops: float = 989.0  # dense bf16 of an H100 SXM
    efficiency: float = 0.5  # share of the peak that layers reach while they compute
    inside: float = 300e9  # NVLink 4: 450 GB/s each way, two thirds of it reached
    between: float = 40e9  # 400 Gb/s a GPU, four fifths of it reached
    latency: float = 10e-6

    def bandwidth(self, span: int) -> float:
        """Of a group whose ranks lie within ``span`` consecutive ranks."""
        return self.inside if span <= self.gpus_per_node else self.between


def traffic(layout: Layout, stage: int) -> dict[str, float]:
    """Kind -> bytes that one rank of a stage sends in a step: tensor or sequence, pipeline, data, context."""
    tensor = "sequence" if layout.config.parallel.sequence else "tensor"
    return {
        tensor: layout.microbatches * tensor_bytes(layout, stage),
        "pipeline": layout.microbatches * pipeline_bytes(layout, stage),
        "data": data_bytes(layout, stage),
        "context": layout.microbatches * sum(share * context_bytes(layout, stage, window) for share, window in layout.windows()),
    }


def tensor_bytes(layout: Layout, stage: int) -> float:
    """A micro-batch's forward and backward pass: every layer enters and leaves two parallel regions each way."""
    if layout.tensor == 1:
        return 0.0
    layers = sum(len(chunk) for chunk in layout.stage(stage))
    again = 1 if layout.config.train.recompute == "full" else 0
    once = hidden_bytes(layout) * (layout.tensor - 1) / layout.tensor  # one gather or one reduction
    ends = 2 * (stage == 0) + 2 * (stage == layout.pipeline - 1)  # embedding; head
    return once * (layers * (8 + 4 * again) + ends)


def pipeline_bytes(layout: Layout, stage: int) -> float:
    """A micro-batch's hidden states to the next stage and their gradients to the one before; once a chunk where interleaved."""
    if layout.pipeline == 1:
        return 0.0
    parts, size = layout.pipeline * layout.chunks, hidden_bytes(layout) / layout.split
    mine = range(stage, parts, layout.pipeline)
    return size * sum((part + 1 < parts) + (part > 0) for part in mine)


def data_bytes(layout: Layout, stage: int) -> float:
    """fp32 gradients to their owners, updated weights to everybody (ZeRO); stage 3 gathers in every pass."""
    settings, ranks, count = layout.config.optimizer, layout.shards, layout.parameters(stage)
    if ranks == 1:
        return 0.0
    level = settings.zero_stage if settings.backend == "zero" else 1
    share = (ranks - 1) / ranks
    if level == 0:
        return 2 * 4.0 * count * share
    reductions = layout.microbatches if level >= 2 else 1
    passes = 3 if layout.config.train.recompute == "full" else 2
    gathers = passes * layout.microbatches if level == 3 else 1
    return (4.0 * reductions + layout.width * gathers) * count * share


def context_bytes(layout: Layout, stage: int, window: int) -> float:
    """What the busiest rank sends of a micro-batch's window halos and memories: forward, again where mixers are recomputed, and back.

    Forward goes to the right and backward to the left, so the first rank has nothing to send in backward, the last one in forward.
    """
    forwards = 1 if layout.config.train.recompute == "none" else 2
    model, length = layout.config.model, layout.config.data.sequence_length
    kinds = [kind for chunk in layout.stage(stage) for kind in chunk]
    sent = [
        sum(COSTS[kind].context_bytes(model, length, window, layout.width, layout.context, rank) for kind in kinds)
        for rank in range(layout.context)
    ]
    busiest = max(forwards * ahead + back for ahead, back in zip(sent, reversed(sent), strict=True))
    return busiest * layout.config.train.micro_batch_size / layout.tensor


def hidden_bytes(layout: Layout) -> float:
    """The hidden states of a micro-batch on one rank, whole over tensor-parallel ranks."""
    return layout.width * layout.config.model.hidden_size * layout.tokens
