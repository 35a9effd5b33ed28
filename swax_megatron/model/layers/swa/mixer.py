"""Causal attention with grouped-query heads and rotary positions: sliding-window (S) and full (F) layers.

Legend: s = T sequence, b batch, h heads of this rank, d head size.
"""

from __future__ import annotations

from torch import Tensor

from swax_megatron.kernels.elementwise import rotary
from swax_megatron.kernels.swa import swa
from swax_megatron.model.layers.mixer import Mixer, split_heads
from swax_megatron.model.linear import ColumnLinear, RowLinear
from swax_megatron.model.transformer_config import SwaxTransformerConfig
from swax_megatron.parallel.context import SequenceContext
from swax_megatron.parallel.context_exchange.halo import with_past


class AttentionMixer(Mixer):
    """Attention whose window arrives with every call: a query sees itself and the w-1 keys before it, in its document."""

    kind = "S"

    def __init__(self, config: SwaxTransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__(config)
        self.layer = layer_number - 1  # Megatron counts from 1
        model = config.model
        self.head_dim = model.attention_head_dim
        self.rope = self.kind in model.rope_kinds
        queries, keys = model.attention_heads * self.head_dim, model.attention_kv_heads * self.head_dim
        self.q_proj = ColumnLinear(config, config.hidden_size, queries)
        self.k_proj = ColumnLinear(config, config.hidden_size, keys)
        self.v_proj = ColumnLinear(config, config.hidden_size, keys)
        self.out_proj = RowLinear(config, queries, config.hidden_size)

    def columns(self) -> tuple[ColumnLinear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def project(self, x_sbh: Tensor, projected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(split_heads(each_sbn, self.head_dim) for each_sbn in projected)

    def core(self, context: SequenceContext, *inputs: Tensor) -> Tensor:
        q_bthd, k_bthd, v_bthd = inputs
        backend = self.config.kernels.backend
        if self.rope:
            q_bthd, k_bthd = rotary(q_bthd, k_bthd, context.positions_bt, self.config.model.rope_base, backend=backend)
        window, cu_seqlens = context.windows[self.layer], context.cu_seqlens
        if context.piece:
            k_bthd, v_bthd = with_past(k_bthd, v_bthd, window - 1, context.piece.ranks)
            cu_seqlens = context.piece.boundaries(k_bthd.shape[1] - q_bthd.shape[1])
        return swa(q_bthd, k_bthd, v_bthd, window, cu_seqlens=cu_seqlens, backend=backend).flatten(-2)
