"""One layer: x + mixer(norm(x)), then x + SwiGLU(norm(x)).

Megatron's TransformerLayer with a forward pass of its own: it needs neither dropout nor biases nor cross-attention, and the gradients
of the residual stream and of the norm beside it are added up inside the norm's backward kernel.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from swax_megatron.parallel.context import SequenceContext


class SwaxLayer(TransformerLayer):
    """Built by Megatron (parameter names, layer numbers), run here."""

    def forward(self, hidden_states: Tensor, packed_seq_params: SequenceContext, **_: object) -> tuple[Tensor, None]:
        """(s, b, h) -> (s, b, h) and no context for cross-attention, as Megatron's TransformerBlock wants it."""
        residual_sbh, normed_sbh = self.input_layernorm(hidden_states, beside=True)
        mixed_sbh, _ = self.self_attention(normed_sbh, packed_seq_params=packed_seq_params)
        residual_sbh, normed_sbh = self.pre_mlp_layernorm(residual_sbh + mixed_sbh, beside=True)
        fed_sbh, _ = self.mlp(normed_sbh)
        return residual_sbh + fed_sbh, None
