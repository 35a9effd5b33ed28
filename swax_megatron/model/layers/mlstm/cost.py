"""Parameters and floating-point operations of one mLSTM mixer."""

from __future__ import annotations

from swax_megatron.schema import ModelConfig


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
