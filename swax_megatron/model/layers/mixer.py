"""What the mixers of all layer kinds share: from the sequence-first residual stream into the heads and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from megatron.core import tensor_parallel
from torch import Tensor, nn

from swax_megatron.model.linear import ColumnLinear, RowLinear
from swax_megatron.model.projections import enter_and_project, project_and_leave
from swax_megatron.model.transformer_config import SwaxTransformerConfig
from swax_megatron.parallel.context import SequenceContext


class Mixer(nn.Module, ABC):
    """Projections -> core -> output projection. A kind gives ``columns``, ``project`` and ``core``, and makes ``out_proj``.

    The core (what lies between the projections) is recomputed in backward under recompute=selective: it has no weights
    but the mLSTM's head norm, and its intermediate results are what a mixer holds most of.
    """

    out_proj: RowLinear

    def __init__(self, config: SwaxTransformerConfig) -> None:
        super().__init__()
        self.config = config

    def borrowed(self) -> Iterator[nn.Parameter]:
        """Parameters that the mixer reads without calling their modules, for whoever gathers weights module by module."""
        yield from (linear.weight for linear in self.columns())

    @abstractmethod
    def columns(self) -> tuple[ColumnLinear, ...]:
        """The projections of the input, in the order in which ``project`` gets their results."""

    @abstractmethod
    def project(self, x_sbh: Tensor, projected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The core's inputs, batch first, from the input of the whole sequence and its projections."""

    @abstractmethod
    def core(self, context: SequenceContext, *inputs: Tensor) -> Tensor:
        """(B, T, channels of this rank)"""

    def forward(self, x_sbh: Tensor, packed_seq_params: SequenceContext, **_: object) -> tuple[Tensor, None]:
        """(s, b, h) -> (s, b, h) and no bias, as Megatron's TransformerLayer wants it."""
        inputs = self.project(*enter_and_project(x_sbh, self.config, self.columns()))
        if self.config.recompute_granularity == "selective" and self.training:
            y_btn = tensor_parallel.checkpoint(lambda *tensors: self.core(packed_seq_params, *tensors), False, *inputs)
        else:
            y_btn = self.core(packed_seq_params, *inputs)
        return project_and_leave(y_btn.transpose(0, 1), self.config, self.out_proj), None


def split_heads(x_sbn: Tensor, head_dim: int) -> Tensor:
    """(s, b, H * D) -> (b, s, H, D), a view"""
    return x_sbn.unflatten(-1, (-1, head_dim)).transpose(0, 1)
