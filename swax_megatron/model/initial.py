"""Initial values of parameters, drawn by (model seed, global name, global index) alone. Imports no megatron.

``swax_megatron.model.parameters`` fills the shards of a model that is being built; an import fills whole tensors that its source lacks.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from swax_megatron import randomness
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import ModelConfig

_SLICE = 1 << 20  # normals that a thread draws at a time: bounds the memory of initialisation
_THREADS = 8  # at most; the ranks of a node share its cores


@dataclass(frozen=True)
class Initial:
    """The initial value of a parameter.

    normal: mean 0, standard deviation ``a``; constant: ``a``; linspace: from ``a`` to ``b`` along the first dimension.
    """

    kind: Literal["normal", "constant", "linspace"]
    a: float
    b: float = 0.0


ZERO = Initial("constant", 0.0)
ONE = Initial("constant", 1.0)  # every norm's weight


def initial_gates(model: ModelConfig) -> dict[str, Initial]:
    """Of the mLSTM's three gates (xLSTM-7B, Beck et al. 2025); its other projections start like everybody's."""
    return {
        "ogate_proj.weight": ZERO,
        "igate_proj.weight": ZERO,
        "fgate_proj.weight": ZERO,
        "igate_proj.bias": Initial("constant", model.mlstm_igate_bias),
        "fgate_proj.bias": Initial("linspace", 3.0, 6.0),  # over the heads: from short to long memory
    }


def matrix(model: ModelConfig) -> Initial:
    """Projections into a layer, and an output head of its own."""
    return Initial("normal", model.init_std)


def embedding(model: ModelConfig) -> Initial:
    """The token embedding, which a tied output head shares."""
    return Initial("normal", model.init_std if model.embedding_init_std is None else model.embedding_init_std)


def residual_matrix(model: ModelConfig) -> Initial:
    """Projections that add to the residual stream: smaller, by the square root of their number."""
    return Initial("normal", model.init_std / (2.0 * len(parse_pattern(model.pattern))) ** 0.5)


def initial_value(name: str, model: ModelConfig) -> Initial:
    """The initial value of the parameter with this training name."""
    if "norm" in name:
        return ONE
    if name.endswith(("out_proj.weight", "down_proj.weight")):
        return residual_matrix(model)
    if name == "embedding.word_embeddings.weight":
        return embedding(model)
    return initial_gates(model).get(name.partition("self_attention.")[2], matrix(model))


@torch.no_grad()
def fill(block: Tensor, initial: Initial, name: str, seed: int, shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    """Fill the block at ``offsets`` of the global parameter ``name`` of shape ``shape`` with its initial value."""
    if initial.kind == "constant":
        block.fill_(initial.a)
    elif initial.kind == "linspace":
        values = torch.linspace(initial.a, initial.b, shape[0], dtype=torch.float32)
        block.copy_(values[offsets[0] : offsets[0] + block.shape[0]])
    else:
        _fill_normal(block, initial.a, name, seed, shape, offsets)


def _fill_normal(block: Tensor, std: float, name: str, seed: int, shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    columns = math.prod(shape[1:])
    local_columns = math.prod(block.shape[1:])
    first_column = offsets[1] if len(offsets) > 1 else 0
    rows_at_once = max(1, _SLICE // columns)
    flat = block.detach().view(block.shape[0], local_columns)

    def draw(row: int) -> None:
        count = min(rows_at_once, block.shape[0] - row)
        start = (offsets[0] + row) * columns
        values = randomness.normal(start, start + count * columns, f"weight:{name}", seed).reshape(count, columns)
        values = np.ascontiguousarray(values[:, first_column : first_column + local_columns]) * np.float32(std)
        flat[row : row + count].copy_(torch.from_numpy(values))

    rows = range(0, block.shape[0], rows_at_once)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = min(len(rows), _THREADS, max(1, len(os.sched_getaffinity(0)) // ranks))
    if threads == 1:
        for row in rows:
            draw(row)
    else:  # numpy draws without holding the interpreter
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, rows))
