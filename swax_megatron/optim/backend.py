"""The interface of an optimizer backend, and what every backend shares: parameter fragments in global coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from swax_megatron.checkpoint.boxes import flat_range_boxes
from swax_megatron.checkpoint.store import Fragment
from swax_megatron.model.parameters import global_offsets, global_shape, local_shape, named_global_parameters
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config

STATES = ("param", "exp_avg", "exp_avg_sq")  # fp32 master weights and AdamW's two moments


class OptimizerBackend(Protocol):
    """What the trainer asks of an optimizer. ``chunks`` is what Megatron's schedules run."""

    chunks: list[nn.Module]

    def zero_grad(self, microbatches: int) -> None:
        """Forget the gradients of the last step; the coming one will add up ``microbatches``."""

    def begin_reduce(self) -> None:
        """Start what ``reduce`` does as far as it waits for nothing on the CPU; the backward passes may be under way still."""

    def reduce(self) -> float:
        """Reduce gradients over all ranks; the global gradient norm before clipping, infinite or NaN where one is not finite."""

    def update(self, learning_rate: float) -> None:
        """Clip the reduced gradients and update the weights."""

    def discard(self) -> None:
        """Forget the reduced gradients instead: weights, moments and the count of updates stay as they are."""

    def fragments(self, *, saving: bool) -> list[Fragment]:
        """This rank's pieces of master weights and moments as boxes of the global tensors (views, filled in place on load).

        saving: leave out what another rank saves (replicas over tensor parallelism, the copy of a tied embedding).
        """

    def loaded(self, updates: int) -> None:
        """After the fragments were filled: set the optimizer's step count, bring the model's weights up to date."""

    def close(self) -> None:
        """Let go of the model: what is hooked into its backward passes would keep the groups and their threads alive."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter whose optimizer state lives on this rank.

    start: first element in the flattened local parameter; tensors: STATES -> flat fp32 tensors of the part
    """

    parameter: nn.Parameter
    start: int
    tensors: dict[str, Tensor]


def fragments(chunks: Iterable[nn.Module], pieces: Iterable[Piece], groups: Groups, *, saving: bool) -> list[Fragment]:
    """Cut every piece into boxes of its global tensor.

    A piece is a contiguous range of a row-major tensor: at most three boxes (part of a row, whole rows, part of a row).
    """
    names = {id(parameter): (name, is_copy) for name, parameter, is_copy in _named(chunks)}
    found: list[Fragment] = []
    for piece in pieces:
        name, is_copy = names[id(piece.parameter)]
        replica = piece.parameter.shard_dim is None and groups.tensor_rank > 0
        if saving and (is_copy or replica):
            continue
        shape = global_shape(piece.parameter, groups.tensor_size)
        origin = global_offsets(piece.parameter, groups.tensor_rank)
        size = piece.tensors["param"].numel()
        for box in flat_range_boxes(local_shape(piece.parameter), piece.start, piece.start + size):
            offsets = tuple(a + b for a, b in zip(origin, box.offsets, strict=True))
            begin = box.flat_start - piece.start
            for state, flat in piece.tensors.items():
                part = flat[begin : begin + box.volume].view(box.sizes)
                found.append(Fragment(f"{state}.{name}", shape, offsets, part))
    return found


def _named(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    for chunk in chunks:
        for name, parameter in named_global_parameters(chunk):
            yield name, parameter, getattr(parameter, "shared", False)


def decay_groups(chunks: Iterable[nn.Module], config: Config) -> list[dict]:
    """AdamW's parameter groups: with weight decay (matrices), and without (norms, biases, gates, by default the tables)."""
    decayed = {True: [], False: []}
    for _, parameter, _ in _named(chunks):
        decayed[parameter.decay].append(parameter)
    weight_decay = {True: config.optimizer.weight_decay, False: 0.0}
    return [{"params": group, "weight_decay": weight_decay[decays]} for decays, group in decayed.items() if group]


def mark_decay(chunks: Iterable[nn.Module], config: Config) -> None:
    """Embedding and head are decayed by option only."""
    for _, parameter, _ in _named(chunks):
        if getattr(parameter, "is_embedding_or_output_parameter", False):
            parameter.decay = config.optimizer.decay_embeddings


def adamw_arguments(config: Config) -> dict:
    """AdamW's settings as torch names them."""
    optimizer = config.optimizer
    return {"lr": optimizer.learning_rate, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}


def step_tensor(updates: int, device: torch.device | str = "cpu") -> Tensor:
    """AdamW's step counter (it corrects the moments' bias); the fused update reads it on its weights' device."""
    return torch.tensor(float(updates), dtype=torch.float32, device=device)
