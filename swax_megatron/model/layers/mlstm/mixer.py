"""The mLSTM mixer (xLSTM-7B block layout, Beck et al. 2025), heads split over the tensor-parallel ranks.

Legend: s = T sequence, b batch, h heads of this rank, k query-key size, v value size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from swax_megatron.kernels.elementwise import gate_projections, uses_triton
from swax_megatron.kernels.mlstm.summary import mlstm_summary
from swax_megatron.model.initial import ZERO, Initial, initial_gates
from swax_megatron.model.layers.mixer import Mixer, split_heads
from swax_megatron.model.linear import ColumnLinear, RowLinear, new_parameter
from swax_megatron.model.norm import HeadNorm
from swax_megatron.model.parameters import declare
from swax_megatron.model.transformer_config import SwaxTransformerConfig
from swax_megatron.parallel.context import SequenceContext
from swax_megatron.parallel.context_exchange.memory import incoming_memory


class GateProjection(nn.Module):
    """One scalar a head; weight (H, hidden) starts at zero, bias (H). Applied in fp32 whatever the model's type."""

    def __init__(self, config: SwaxTransformerConfig, bias: Initial) -> None:
        super().__init__()
        heads = config.model.mlstm_heads // config.tensor_model_parallel_size
        self.weight = declare(new_parameter(config, heads, config.hidden_size), ZERO, shard_dim=0)
        self.bias = declare(new_parameter(config, heads), bias, shard_dim=0)

    def forward(self, x_float_sbh: Tensor) -> Tensor:
        """fp32 input -> (s, b, H) fp32; bf16 would move log f by up to 3 percent."""
        return F.linear(x_float_sbh, self.weight.float(), self.bias.float())


class MlstmMixer(Mixer):
    """q, k, v, output gate and the two scalar gates -> mLSTM cell -> per-head norm -> sigmoid(o) * . -> out."""

    def __init__(self, config: SwaxTransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__(config)
        self.layer = layer_number - 1  # Megatron counts from 1
        model = config.model
        self.qk_dim, self.v_dim = model.mlstm_qk_dim, model.mlstm_v_dim
        qk, values = model.mlstm_heads * model.mlstm_qk_dim, model.mlstm_heads * model.mlstm_v_dim
        self.q_proj = ColumnLinear(config, config.hidden_size, qk)
        self.k_proj = ColumnLinear(config, config.hidden_size, qk)
        self.v_proj = ColumnLinear(config, config.hidden_size, values)
        self.ogate_proj = ColumnLinear(config, config.hidden_size, values, ZERO)
        initial = initial_gates(model)
        self.igate_proj = GateProjection(config, initial["igate_proj.bias"])
        self.fgate_proj = GateProjection(config, initial["fgate_proj.bias"])
        self.head_norm = HeadNorm(config, values)
        self.out_proj = RowLinear(config, values, config.hidden_size)

    def columns(self) -> tuple[ColumnLinear, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.ogate_proj

    def project(self, x_sbh: Tensor, projected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q_sbn, k_sbn, v_sbn, ogate_sbn = projected
        igate_sbh, fgate_sbh = self.gates(x_sbh)
        return (
            split_heads(q_sbn, self.qk_dim),
            split_heads(k_sbn, self.qk_dim),
            split_heads(v_sbn, self.v_dim),
            igate_sbh.transpose(0, 1),
            fgate_sbh.transpose(0, 1),
            split_heads(ogate_sbn, self.v_dim),
        )

    def borrowed(self) -> Iterator[nn.Parameter]:
        yield from (*super().borrowed(), *self.igate_proj.parameters(), *self.fgate_proj.parameters())

    def gates(self, x_sbh: Tensor) -> tuple[Tensor, Tensor]:
        """Both gates, (s, b, H) fp32; one kernel reads x once for both."""
        igate, fgate, backend = self.igate_proj, self.fgate_proj, self.config.kernels.backend
        if uses_triton(x_sbh, backend):
            return gate_projections(x_sbh, igate.weight, igate.bias, fgate.weight, fgate.bias, backend=backend)
        x_float_sbh = x_sbh.float()
        return igate(x_float_sbh), fgate(x_float_sbh)

    def core(self, context: SequenceContext, *inputs: Tensor) -> Tensor:
        model, memory = self.config.model, None
        if context.piece:
            _, k_bthk, v_bthv, igate_bth, fgate_bth, _ = inputs
            summary = mlstm_summary(k_bthk, v_bthv, igate_bth, fgate_bth, context.last_start_b, gate_cap=model.gate_cap)
            memory = incoming_memory(summary, context.continues_b, context.piece.ranks)
        return self.head_norm(
            *inputs,
            cu_seqlens=context.cu_seqlens,
            initial_state=memory,
            gate_cap=model.gate_cap,
            chunk_size=self.config.kernels.mlstm_chunk,
            backend=self.config.kernels.backend,
        ).flatten(-2)
