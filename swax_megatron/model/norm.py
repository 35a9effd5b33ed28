"""The two norms: RMSNorm on the residual stream, a per-head LayerNorm on the mLSTM's output."""

from __future__ import annotations

from torch import Tensor, nn

from swax_megatron.kernels.mlstm import mlstm_fused
from swax_megatron.kernels.norm import rms_norm, rms_norm_beside
from swax_megatron.model.initial import ONE
from swax_megatron.model.linear import new_parameter
from swax_megatron.model.parameters import declare
from swax_megatron.model.transformer_config import SwaxTransformerConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    Megatron's own wrapper refuses sequence parallelism; here the weight says that its gradient is a partial sum then.
    """

    def __init__(self, config: SwaxTransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__()
        self.eps, self.backend = eps, config.kernels.backend
        self.weight = declare(new_parameter(config, hidden_size), ONE, sequence_parallel=config.sequence_parallel)

    def forward(self, x_sbh: Tensor, *, beside: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm; with beside, x as well, for what adds to it: (x, norm)."""
        norm = rms_norm_beside if beside else rms_norm
        return norm(x_sbh, self.weight, self.eps, backend=self.backend)


class HeadNorm(nn.Module):
    """LayerNorm of every head by itself: mean subtracted, weight only, reductions in fp32.

    The weight has one entry a channel of all heads, split over the tensor-parallel ranks like the heads: a weight
    shared by heads would be replicated while each rank sees only its own heads, and would drift apart.
    """

    def __init__(self, config: SwaxTransformerConfig, channels: int) -> None:
        super().__init__()
        self.eps = config.model.norm_eps
        self.weight = declare(new_parameter(config, channels // config.tensor_model_parallel_size), ONE, shard_dim=0)

    def forward(self, *cell: Tensor, **options: object) -> Tensor:
        """The cell, this norm and the output gate in one operator: arguments and result of ``mlstm_fused``, less the norm's.

        Inside the module, so that ZeRO's stage 3 finds the weight in use.
        """
        return mlstm_fused(*cell, self.weight, norm_eps=self.eps, **options)
