"""Refusals of the layout over processes."""

from __future__ import annotations

import math

from swax_megatron.batching import batch_sizes
from swax_megatron.model.cost import VOCABULARY_MULTIPLE, padded_vocab_size
from swax_megatron.schema import Config


def model_parallel_size(config: Config) -> int:
    """Processes that hold one copy of the model."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def check_tensor_parallel(config: Config, kinds: str) -> None:
    tensor, model = config.parallel.tensor, config.model
    _divides(tensor, "model.attention_heads", model.attention_heads)
    if model.attention_kv_heads < tensor:
        raise ValueError(
            f"model.attention_kv_heads={model.attention_kv_heads}: every one of parallel.tensor={tensor} ranks needs a key-value head; "
            f"use parallel.tensor={math.gcd(tensor, model.attention_kv_heads)} or more heads"
        )
    _divides(tensor, "model.attention_kv_heads", model.attention_kv_heads)
    if "M" in kinds:
        _divides(tensor, "model.mlstm_heads", model.mlstm_heads)
    _divides(tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    padded = padded_vocab_size(model.vocab_size)
    if padded % tensor:
        raise ValueError(
            f"parallel.tensor={tensor}: must divide the vocabulary padded to a multiple of {VOCABULARY_MULTIPLE}, "
            f"{padded} for model.vocab_size={model.vocab_size}; use a power of two"
        )


def _divides(tensor: int, path: str, value: int) -> None:
    if value % tensor:
        multiple = -(-value // tensor) * tensor
        raise ValueError(f"{path}={value}: must be divisible by parallel.tensor={tensor}, e.g. {path}={multiple}")


def check_row_pieces(config: Config) -> None:
    """Rows are cut into equal pieces over context-parallel ranks, and those over tensor-parallel ranks between the mixers."""
    parallel, length = config.parallel, config.data.sequence_length
    pieces, otherwise = parallel.context, ""
    named = f"parallel.context={parallel.context}" if parallel.context > 1 else ""
    if parallel.sequence:
        pieces, otherwise = parallel.context * parallel.tensor, "; or parallel.sequence=false"
        named = " x ".join(part for part in (named, f"parallel.tensor={parallel.tensor}") if part)
    if length % pieces:
        multiple = -(-length // pieces) * pieces
        raise ValueError(f"data.sequence_length={length}: must be divisible by {named}, e.g. data.sequence_length={multiple}{otherwise}")


def check_pipeline(config: Config, layers: int) -> None:
    parallel = config.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if chunks > 1 and stages == 1:
        raise ValueError(
            f"parallel.virtual_pipeline={chunks}: chunks interleave over several stages; leave it out with parallel.pipeline=1"
        )
    parts = stages * chunks
    if parallel.pipeline_layers is None:
        if layers < parts:
            raise ValueError(
                f"parallel.pipeline={stages}: {layers} layers (model.pattern={config.model.pattern}) are fewer than {stages} stages x "
                f"{chunks} chunks, and each needs one; use fewer stages or chunks"
            )
        return
    counts = parallel.pipeline_layers
    if len(counts) != parts:
        raise ValueError(
            f"parallel.pipeline_layers={counts}: needs {parts} numbers, one for each of parallel.pipeline={stages} stages"
            + (f" x parallel.virtual_pipeline={chunks} chunks" if chunks > 1 else "")
        )
    if min(counts) < 1:
        raise ValueError(f"parallel.pipeline_layers={counts}: every stage and chunk needs at least one layer")
    if sum(counts) != layers:
        raise ValueError(
            f"parallel.pipeline_layers={counts}: sums to {sum(counts)}; model.pattern={config.model.pattern} has {layers} layers"
        )


def check_world(config: Config, world_size: int | None) -> None:
    parallel, train = config.parallel, config.train
    for field, size in batch_sizes(config):
        if size % train.micro_batch_size:
            raise ValueError(f"{field}={size}: must be a multiple of train.micro_batch_size={train.micro_batch_size}")
    if world_size is None:
        return
    size = model_parallel_size(config)
    if world_size < 1 or world_size % size:
        raise ValueError(
            f"{world_size} processes: must be a multiple of parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} = {size}; start {max(1, world_size // size) * size} or change the layout"
        )
    replicas = world_size // size
    rows = train.micro_batch_size * replicas
    for field, batch in batch_sizes(config):
        if batch % rows:
            raise ValueError(
                f"{field}={batch}: must be divisible by train.micro_batch_size={train.micro_batch_size} x "
                f"{replicas} data-parallel replicas, e.g. {field}={-(-batch // rows) * rows}"
            )
        microbatches = batch // rows
        if (parallel.virtual_pipeline or 1) > 1 and microbatches % parallel.pipeline:
            raise ValueError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline}: the interleaved schedule needs microbatches in multiples of "
                f"parallel.pipeline={parallel.pipeline}, there are {microbatches}; "
                f"e.g. {field}={-(-microbatches // parallel.pipeline) * parallel.pipeline * rows}"
            )
