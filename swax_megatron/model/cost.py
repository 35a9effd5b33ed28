"""Parameters and model FLOPs of a whole network, from what each layer kind says of itself.

Only work that the mathematics asks for is counted: the drawn window, the causal half once, mLSTM by its recurrent
minimum, no recomputation. Backward is twice the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from swax_megatron.model.layers.full import cost as full
from swax_megatron.model.layers.mlstm import cost as mlstm
from swax_megatron.model.layers.swa import cost as swa
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import ModelConfig

COSTS = {"M": mlstm, "S": swa, "F": full}
VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """The rows of the embedding and of the head: a multiple of 128 whatever the layout."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def param_count(model: ModelConfig, *, padded: bool = False) -> int:
    """Parameters of the model; ``padded`` counts the padding rows of the vocabulary as well."""
    vocabulary = padded_vocab_size(model.vocab_size) if padded else model.vocab_size
    tables = vocabulary * model.hidden_size * (1 if model.tie_embeddings else 2)
    feedforward = 3 * model.hidden_size * model.ffn_hidden_size
    norms = 2 * model.hidden_size
    layers = sum(COSTS[kind].param_count(model) + feedforward + norms for kind in parse_pattern(model.pattern))
    return tables + layers + model.hidden_size


def forward_flops(model: ModelConfig, sequence_length: int, windows: Sequence[int], kinds: str | None = None) -> float:
    """Forward operations a token; ``windows`` holds the window of every layer (WindowSchedule.layers).

    kinds: the layers, one letter each; None: all of model.pattern
    """
    feedforward = 2.0 * 3 * model.hidden_size * model.ffn_hidden_size
    total = 2.0 * model.hidden_size * model.vocab_size
    for kind, window in zip(parse_pattern(model.pattern) if kinds is None else kinds, windows, strict=True):
        cost = COSTS[kind]
        total += feedforward + cost.projection_flops(model) + cost.core_flops(model, sequence_length, window)
    return total


def training_flops(model: ModelConfig, sequence_length: int, windows: Sequence[int]) -> float:
    """Forward and backward operations a token."""
    return 3.0 * forward_flops(model, sequence_length, windows)
