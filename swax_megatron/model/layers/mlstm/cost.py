"""Parameters and floating-point operations of one mLSTM mixer."""

from __future__ import annotations

from swax_megatron.model.layers.footprint import Footprint
from swax_megatron.schema import ModelConfig

TRITON_STATE_TOKENS = 256  # the kernels store a state every so many tokens (128 for the smaller heads)


def param_count(model: ModelConfig) -> int:
    """Projections q, k, v, o and out, the two gates with biases, the head norm."""
    qk, values = model.mlstm_heads * model.mlstm_qk_dim, model.mlstm_heads * model.mlstm_v_dim
    return model.hidden_size * (2 * qk + 3 * values) + 2 * (model.hidden_size + 1) * model.mlstm_heads + values


def projection_flops(model: ModelConfig) -> float:
    """Forward matrix products a token, 2 operations a multiply-add."""
    qk, values = model.mlstm_heads * model.mlstm_qk_dim, model.mlstm_heads * model.mlstm_v_dim
    return 2.0 * model.hidden_size * (2 * qk + 3 * values + 2 * model.mlstm_heads)


def core_flops(model: ModelConfig, sequence_length: int, window: int) -> float:
    """Forward operations of the cell a token, by its recurrent minimum: k vᵀ into the state and q out of it.

    A chunked kernel does more; counting that would flatter it. Window and length do not matter.
    """
    return 4.0 * model.mlstm_heads * model.mlstm_qk_dim * model.mlstm_v_dim


def footprint(model: ModelConfig, length: int, window: int, width: int, kernels: str, chunk: int) -> Footprint:
    """Bytes a token that backward needs. length: tokens of a row on this rank; width: bytes of an activation; chunk: the reference's."""
    heads, qk, values = model.mlstm_heads, model.mlstm_heads * model.mlstm_qk_dim, model.mlstm_heads * model.mlstm_v_dim
    gates = 8.0 * heads
    inputs = width * (2 * qk + 2 * values) + gates
    if kernels == "triton":
        # q, k, v, the output gate and h; row, col, m, wq, wk and the denominator of every token and head; the chunks' states
        states = heads * model.mlstm_qk_dim * (2.0 * model.mlstm_v_dim + 4.0) / TRITON_STATE_TOKENS
        core = width * (2 * qk + 3 * values) + gates + 24.0 * heads + states
        return Footprint(inputs, core, width * values, states)
    # after the cell, in fp32: h, its normed self, that times the weight, the output gate's sigmoid; mean and scale of every head
    norm = 16.0 * values + 8.0 * heads
    size = min(chunk, length)
    padding = -(-length // size) * size / length
    states = 8.0 * heads * model.mlstm_qk_dim * (model.mlstm_v_dim + 1) / size * padding
    # q and k five times and [v | 1] three times in fp32; the L x L weights of every chunk three times; masks and gates
    core = padding * (4.0 * 6 * qk + 4.0 * 3 * (values + heads) + 4.0 * 3 * heads * size + 2.0 * size + 4.0 * 9 * heads) + states + norm
    whole = 4.0 * model.hidden_size if width < 4 else 0.0  # of the gates, in fp32
    return Footprint(inputs, core, width * values, states, whole)


def context_bytes(model: ModelConfig, length: int, window: int, width: int, ranks: int, rank: int = 0) -> float:
    """Bytes that a rank (the first: the most) sends for one row's forward pass: at most ceil(log2 P) fp32 memories, and the stabilisers."""
    if ranks == 1:
        return 0.0
    memory = 4.0 * model.mlstm_heads * model.mlstm_qk_dim * (model.mlstm_v_dim + 1)
    return (ranks - 1 - rank).bit_length() * memory + 2 * 4.0 * model.mlstm_heads * (ranks - 1)
