"""The mLSTM mixer (xLSTM-7B block layout, Beck et al. 2025), heads split over the tensor-parallel ranks.

Legend: s = T sequence, b batch, h heads of this rank, k query-key size, v value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from swax_megatron.kernels.mlstm import mlstm
from swax_megatron.model.linear import ColumnLinear, RowLinear, enter_tensor_parallel, leave_tensor_parallel, new_parameter
from swax_megatron.model.norm import HeadNorm
from swax_megatron.model.parameters import Initial, declare
from swax_megatron.model.transformer_config import SwaxTransformerConfig
from swax_megatron.parallel.context import SequenceContext

INPUT_GATE_BIAS = Initial("constant", -10.0)
FORGET_GATE_BIAS = Initial("linspace", 3.0, 6.0)  # over the heads: from short to long memory
ZERO = Initial("constant", 0.0)


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


class MlstmMixer(nn.Module):
    """q, k, v, output gate and the two scalar gates -> mLSTM cell -> per-head norm -> sigmoid(o) * . -> out."""

    def __init__(self, config: SwaxTransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.heads = model.mlstm_heads // config.tensor_model_parallel_size
        qk, values = model.mlstm_heads * model.mlstm_qk_dim, model.mlstm_heads * model.mlstm_v_dim
        self.q_proj = ColumnLinear(config, config.hidden_size, qk)
        self.k_proj = ColumnLinear(config, config.hidden_size, qk)
        self.v_proj = ColumnLinear(config, config.hidden_size, values)
        self.ogate_proj = ColumnLinear(config, config.hidden_size, values, ZERO)
        self.igate_proj = GateProjection(config, INPUT_GATE_BIAS)
        self.fgate_proj = GateProjection(config, FORGET_GATE_BIAS)
        self.head_norm = HeadNorm(config, values)
        self.out_proj = RowLinear(config, values, config.hidden_size)

    def forward(self, x_sbh: Tensor, packed_seq_params: SequenceContext, **_: object) -> tuple[Tensor, None]:
        x_sbh = enter_tensor_parallel(x_sbh, self.config)
        x_float_sbh = x_sbh.float()
        tensors = (
            *(self._heads(projection(x_sbh)) for projection in (self.q_proj, self.k_proj, self.v_proj)),
            self.igate_proj(x_float_sbh).transpose(0, 1),
            self.fgate_proj(x_float_sbh).transpose(0, 1),
            self.ogate_proj(x_sbh).transpose(0, 1),
        )

        def core(*inputs: Tensor) -> Tensor:
            return self._core(packed_seq_params, *inputs)

        if self.config.recompute_granularity == "selective" and self.training:
            y_btn = tensor_parallel.checkpoint(core, False, *tensors)
        else:
            y_btn = core(*tensors)
        return leave_tensor_parallel(self.out_proj(y_btn.transpose(0, 1)), self.config), None

    def _heads(self, x_sbn: Tensor) -> Tensor:
        """(s, b, H * D) -> (b, s, H, D), a view"""
        return x_sbn.unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def _core(self, context: SequenceContext, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, o_btn: Tensor) -> Tensor:
        h_bthv = mlstm(
            q,
            k,
            v,
            i,
            f,
            cu_seqlens=context.cu_seqlens,
            gate_cap=self.config.model.gate_cap,
            chunk_size=self.config.kernels.mlstm_chunk,
            backend=self.config.kernels.backend,
        )
        return torch.sigmoid(o_btn) * self.head_norm(h_bthv)
