"""SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), hidden units split over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from swax_megatron.kernels.elementwise import swiglu, uses_triton
from swax_megatron.kernels.feedforward import GatedDown
from swax_megatron.model.linear import ColumnLinear, RowLinear, enter_tensor_parallel, leave_tensor_parallel
from swax_megatron.model.projections import project
from swax_megatron.model.transformer_config import SwaxTransformerConfig


class SwiGLU(nn.Module):
    """Separate gate and up projections: a checkpoint then needs no knowledge of how a fused one interleaves over ranks."""

    def __init__(self, config: SwaxTransformerConfig, **_: object) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = ColumnLinear(config, config.hidden_size, config.ffn_hidden_size)
        self.up_proj = ColumnLinear(config, config.hidden_size, config.ffn_hidden_size)
        self.down_proj = RowLinear(config, config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_sbh: Tensor, **_: object) -> tuple[Tensor, None]:
        x_sbh = enter_tensor_parallel(x_sbh, self.config)
        gate_sbf, up_sbf = project(x_sbh, self.gate_proj, self.up_proj)
        if self._product_again(gate_sbf):
            y_sbh = GatedDown.apply(gate_sbf, up_sbf, self.down_proj.weight)
        else:
            y_sbh = self.down_proj(swiglu(gate_sbf, up_sbf, backend=self.config.kernels.backend))
        return leave_tensor_parallel(y_sbh, self.config), None

    def borrowed(self) -> Iterator[nn.Parameter]:
        """As a mixer's."""
        yield from (self.gate_proj.weight, self.up_proj.weight)

    def _product_again(self, gate_sbf: Tensor) -> bool:
        """Whether backward makes the product of gate and up again: not where it is kept in 8 bits, where DeepSpeed gathers the weight
        (ZeRO's stage 3) or without kernels.
        """
        down = self.down_proj
        plain = down.small is None and not hasattr(down.weight, "ds_id")
        return plain and torch.is_grad_enabled() and uses_triton(gate_sbf, self.config.kernels.backend)
