"""What the mixers of all layer kinds share: from the sequence-first residual stream into the heads and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from megatron.core import tensor_parallel
from torch import Tensor, nn

from swax_megatron.model.linear import RowLinear, enter_tensor_parallel, leave_tensor_parallel
from swax_megatron.model.transformer_config import SwaxTransformerConfig
from swax_megatron.parallel.context import SequenceContext


class Mixer(nn.Module, ABC):
    """Projections -> core -> output projection. A kind gives ``project`` and ``core``, and makes ``out_proj``.

    The core (what lies between the projections) is recomputed in backward under recompute=selective: it has no weights
    but the mLSTM's head norm, and its intermediate results are what a mixer holds most of.
    """

    out_proj: RowLinear

    def __init__(self, config: SwaxTransformerConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def borrowed(self) -> Iterator[nn.Parameter]:
        """Parameters that the mixer reads without calling their modules, for whoever gathers weights module by module."""

    @abstractmethod
    def project(self, x_sbh: Tensor) -> tuple[Tensor, ...]:
        """The core's inputs, batch first."""

    @abstractmethod
    def core(self, context: SequenceContext, *inputs: Tensor) -> Tensor:
        """(B, T, channels of this rank)"""

    def forward(self, x_sbh: Tensor, packed_seq_params: SequenceContext, **_: object) -> tuple[Tensor, None]:
        """(s, b, h) -> (s, b, h) and no bias, as Megatron's TransformerLayer wants it."""
        inputs = self.project(enter_tensor_parallel(x_sbh, self.config))
        if self.config.recompute_granularity == "selective" and self.training:
            y_btn = tensor_parallel.checkpoint(lambda *tensors: self.core(packed_seq_params, *tensors), False, *inputs)
        else:
            y_btn = self.core(packed_seq_params, *inputs)
        return leave_tensor_parallel(self.out_proj(y_btn.transpose(0, 1)), self.config), None


def split_heads(x_sbn: Tensor, head_dim: int) -> Tensor:
    """(s, b, H * D) -> (b, s, H, D), a view"""
    return x_sbn.unflatten(-1, (-1, head_dim)).transpose(0, 1)
