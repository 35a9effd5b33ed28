"""Causal attention with grouped-query heads and rotary positions: sliding-window (S) and full (F) layers.

Legend: s = T sequence, b batch, h heads of this rank, d head size.
"""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import Tensor, nn

from swax_megatron.kernels.swa import swa
from swax_megatron.model.linear import ColumnLinear, RowLinear, enter_tensor_parallel, leave_tensor_parallel
from swax_megatron.model.rotary import rotate
from swax_megatron.model.transformer_config import SwaxTransformerConfig
from swax_megatron.parallel.context import SequenceContext


class AttentionMixer(nn.Module):
    """Attention whose window arrives with every call: a query sees itself and the w-1 keys before it, in its document."""

    kind = "S"

    def __init__(self, config: SwaxTransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__()
        self.config = config
        self.layer = layer_number - 1  # Megatron counts from 1
        model = config.model
        self.head_dim = model.attention_head_dim
        self.rope = self.kind in model.rope_kinds
        queries, keys = model.attention_heads * self.head_dim, model.attention_kv_heads * self.head_dim
        self.q_proj = ColumnLinear(config, config.hidden_size, queries)
        self.k_proj = ColumnLinear(config, config.hidden_size, keys)
        self.v_proj = ColumnLinear(config, config.hidden_size, keys)
        self.out_proj = RowLinear(config, queries, config.hidden_size)

    def forward(self, x_sbh: Tensor, packed_seq_params: SequenceContext, **_: object) -> tuple[Tensor, None]:
        x_sbh = enter_tensor_parallel(x_sbh, self.config)
        tensors = tuple(self._heads(projection(x_sbh)) for projection in (self.q_proj, self.k_proj, self.v_proj))

        def core(*inputs: Tensor) -> Tensor:
            return self._core(packed_seq_params, *inputs)

        if self.config.recompute_granularity == "selective" and self.training:
            y_btn = tensor_parallel.checkpoint(core, False, *tensors)
        else:
            y_btn = core(*tensors)
        return leave_tensor_parallel(self.out_proj(y_btn.transpose(0, 1)), self.config), None

    def _heads(self, x_sbn: Tensor) -> Tensor:
        """(s, b, H * D) -> (b, s, H, D), a view"""
        return x_sbn.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def _core(self, context: SequenceContext, q_bthd: Tensor, k_bthd: Tensor, v_bthd: Tensor) -> Tensor:
        if self.rope:
            cos, sin = context.rotary(self.head_dim, self.config.model.rope_base)
            q_bthd, k_bthd = rotate(q_bthd, cos, sin), rotate(k_bthd, cos, sin)
        window = context.windows[self.layer]
        return swa(q_bthd, k_bthd, v_bthd, window, cu_seqlens=context.cu_seqlens, backend=self.config.kernels.backend).flatten(-2)
