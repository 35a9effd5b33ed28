"""Bytes that the busiest rank sends in one step, by kind. Collectives are counted as rings: a reduction or a gather over n ranks
sends (n - 1) / n of the whole, an all-reduce twice that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from swax_megatron.model.cost import COSTS
from swax_megatron.plan.layout import Layout
from swax_megatron.schema import ModelConfig


@dataclass(frozen=True)
class Cluster:
    """Machines and links. Bytes a second that one GPU sends, as reached in practice; seconds that a message waits."""

    gpus_per_node: int = 8
    gib: float = 80.0
    peak_tflops: float = 989.0  # dense bf16 of an H100 SXM
    # Share of the peak that layers reach while they compute: with it the plan's step of the 1.4B model takes what it took on one H200
    # (an H100's arithmetic, faster memory; benchmarks/results/train_step_h200.jsonl; docs/scaling.md has the ratios).
    efficiency: float = 0.54
    # NVLink 4, 450 GB/s each way. With 50 us a message: what NCCL's collectives of 4 to 512 MB reached between two H200, to a tenth but for
    # the largest, in one run (benchmarks/results/multi_gpu_h200x2_before.jsonl); later ones were up to a quarter faster at 4 MB.
    inside: float = 280e9
    between: float = 40e9  # 400 Gb/s a GPU, four fifths of it reached
    latency: float = 50e-6

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
    return gradient_bytes(layout, stage) + weight_bytes(layout, stage)


def gradient_bytes(layout: Layout, stage: int) -> float:
    """Of the sums over data-parallel ranks. DeepSpeed's stages below 3 send every rank the whole sum, of which it keeps its part."""
    settings, ranks = layout.config.optimizer, layout.shards
    whole = settings.backend == "zero" and settings.zero_stage < 3
    sums = layout.microbatches if settings.backend == "zero" and settings.zero_stage >= 2 else 1
    return 4.0 * sums * (2 if whole else 1) * layout.parameters(stage) * (ranks - 1) / ranks


def weight_bytes(layout: Layout, stage: int) -> float:
    """Of the gathers of updated weights; in stage 3 of every pass's."""
    settings, ranks = layout.config.optimizer, layout.shards
    level = settings.zero_stage if settings.backend == "zero" else 1
    passes = 3 if layout.config.train.recompute == "full" else 2
    gathers = {0: 0, 3: passes * layout.microbatches}.get(level, 1)
    return float(layout.width) * gathers * layout.parameters(stage) * (ranks - 1) / ranks


def all_to_all_bytes(model: ModelConfig, kind: str, length: int, width: int, ranks: int) -> float:
    """Bytes that a rank sends for one row's forward pass when sequence is exchanged for heads and back (Jacobs et al. 2023, "Ulysses").

    Queries, keys, values and outputs once; an mLSTM's gates, a number a head and token, are left out.
    """
    if kind == "M":
        channels = model.mlstm_heads * (2 * model.mlstm_qk_dim + 2 * model.mlstm_v_dim)
    else:
        channels = model.attention_head_dim * 2 * (model.attention_heads + model.attention_kv_heads)
    return width * channels * length / ranks * (ranks - 1) / ranks


def heads_suffice(layout: Layout) -> bool:
    """Whether every rank of tensor x context would have heads of its own, which an exchange of sequence for heads needs."""
    model, kinds = layout.config.model, set("".join(layout.parts))
    heads = [model.mlstm_heads] if "M" in kinds else []
    heads += [model.attention_heads, model.attention_kv_heads] if kinds & set("SF") else []
    return layout.context == 1 or all(each % (layout.tensor * layout.context) == 0 for each in heads)


def context_bytes(layout: Layout, stage: int, window: int, context: str = "halo") -> float:
    """What the busiest rank sends of a micro-batch's window halos and memories: forward, again where mixers are recomputed, and back.

    Forward goes to the right and backward to the left, so the first rank has nothing to send in backward, the last one in forward.
    context: "halo", as the runs do; "all_to_all", as they would if they exchanged sequence for heads.
    """
    forwards = 1 if layout.config.train.recompute == "none" else 2
    model, length = layout.config.model, layout.config.data.sequence_length
    kinds = Counter("".join(layout.stage(stage)))
    if context == "all_to_all":
        once = sum(count * all_to_all_bytes(model, kind, length, layout.width, layout.context) for kind, count in kinds.items())
        return (forwards + 1) * once * layout.config.train.micro_batch_size / layout.tensor
    sent = [
        sum(count * COSTS[kind].context_bytes(model, length, window, layout.width, layout.context, rank) for kind, count in kinds.items())
        for rank in range(layout.context)
    ]
    busiest = max(forwards * ahead + back for ahead, back in zip(sent, reversed(sent), strict=True))
    return busiest * layout.config.train.micro_batch_size / layout.tensor


def hidden_bytes(layout: Layout) -> float:
    """The hidden states of a micro-batch on one rank, whole over tensor-parallel ranks."""
    return layout.width * layout.config.model.hidden_size * layout.tokens
