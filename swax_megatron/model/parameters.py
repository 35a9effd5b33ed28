"""How a parameter starts, is sharded and is decayed: declared beside its module, used everywhere else.

Initial weights are drawn by (model seed, global name, global index) alone, so that no layout changes a run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from swax_megatron.model.initial import Initial, fill


def declare(
    parameter: nn.Parameter, initial: Initial, *, shard_dim: int | None = None, sequence_parallel: bool = False, decay: bool = False
) -> nn.Parameter:
    """Attach what the rest of the program must know of a parameter.

    shard_dim: dimension split over the tensor-parallel ranks; None: every rank holds the whole of it
    sequence_parallel: its gradient is a partial sum over the sequence and must be added up over the tensor-parallel ranks
    decay: weight decay applies
    """
    parameter.initial = initial
    parameter.shard_dim = shard_dim
    parameter.decay = decay
    parameter.sequence_parallel = sequence_parallel
    if shard_dim is not None and not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, shard_dim, 1)  # gradient norms count shards on every rank
    return parameter


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of this rank's shard; ZeRO stage 3 takes the values away between uses and keeps the shape aside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def global_shape(parameter: Tensor, tensor_size: int) -> tuple[int, ...]:
    """The parameter's shape before tensor parallelism."""
    shape = list(local_shape(parameter))
    if parameter.shard_dim is not None:
        shape[parameter.shard_dim] *= tensor_size
    return tuple(shape)


def global_offsets(parameter: Tensor, tensor_rank: int) -> tuple[int, ...]:
    """Where this rank's shard begins in the global parameter."""
    return tuple(tensor_rank * n if dim == parameter.shard_dim else 0 for dim, n in enumerate(local_shape(parameter)))


def named_global_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(global name, parameter) of one model chunk; layers carry their number in the whole model, 0-based.

    The last stage's copy of a tied embedding bears the embedding's name.
    """
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        elif chunk.share_embeddings_and_output_weights and name == "output_layer.weight":
            parts = ["embedding", "word_embeddings", "weight"]
        yield ".".join(parts), parameter


@torch.no_grad()
def initialize(chunk: nn.Module, seed: int, tensor_rank: int, tensor_size: int) -> None:
    """Fill every parameter of a chunk with its declared initial value."""
    for name, parameter in named_global_parameters(chunk):
        shape, offsets = global_shape(parameter, tensor_size), global_offsets(parameter, tensor_rank)
        fill(parameter, parameter.initial, name, seed, shape, offsets)
