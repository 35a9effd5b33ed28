"""SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), hidden units split over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from swax_megatron.model.linear import ColumnLinear, RowLinear
from swax_megatron.model.projections import enter_and_project, swiglu_and_leave
from swax_megatron.model.transformer_config import SwaxTransformerConfig


class SwiGLU(nn.Module):
    """Separate gate and up projections: a checkpoint then needs no knowledge of how a fused one interleaves over ranks."""

    def __init__(self, config: SwaxTransformerConfig, **_: object) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = ColumnLinear(config, config.hidden_size, config.ffn_hidden_size)
        self.up_proj = ColumnLinear(config, config.hidden_size, config.ffn_hidden_size)
        self.down_proj = RowLinear(config, config.ffn_hidden_size, config.hidden_size)

    def borrowed(self) -> Iterator[nn.Parameter]:
        """As a mixer's: parameters read without calling their modules."""
        yield from (self.gate_proj.weight, self.up_proj.weight)

    def forward(self, x_sbh: Tensor, **_: object) -> tuple[Tensor, None]:
        _, (gate_sbf, up_sbf) = enter_and_project(x_sbh, self.config, (self.gate_proj, self.up_proj))
        return swiglu_and_leave(gate_sbf, up_sbf, self.config, self.down_proj), None
