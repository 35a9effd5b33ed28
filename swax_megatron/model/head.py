"""The output head and the losses of every token, without ever holding all logits.

Tokens are taken in chunks: the logits of a chunk are computed, capped, masked and reduced to two numbers a token (the
log-partition and the target's logit), then forgotten; backward computes them again, chunk by chunk. That is one more
product with the head's weight, against 4 bytes x tokens x vocabulary of fp32 logits, kept several times over. On a GPU
a kernel reduces the product as it comes (kernels/losses), so that a chunk exists once, in the model's type. Where one
chunk holds all tokens, its logits are kept for backward (in the model's type) instead of computed again.

Legend: s sequence, b batch, h hidden, n = s * b tokens, c tokens of a chunk, v vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from swax_megatron.kernels.losses import capped, logit_gradients, logit_statistics
from swax_megatron.model.cost import padded_vocab_size
from swax_megatron.model.linear import enter_tensor_parallel
from swax_megatron.model.transformer_config import SwaxTransformerConfig


@dataclass(frozen=True)
class Vocabulary:
    """This rank's rows of the padded vocabulary and what happens to their logits.

    start: first row of this rank; real: rows here that are not padding; cap: soft cap of the logits, None for none
    """

    start: int
    real: int
    cap: float | None
    group: dist.ProcessGroup
    backend: str = "auto"  # of the kernels over logits

    def logits(self, raw_nv: Tensor) -> Tensor:
        """Logits in fp32 or wider: the soft cap first, then -inf on the vocabulary's padding, which can then never take probability."""
        return capped(raw_nv, self.real, self.cap)

    def statistics(self, raw_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """Log-partition and the targets' logits, over all ranks."""
        log_partition_n, chosen_n = logit_statistics(raw_nv, targets_n - self.start, self.real, self.cap, backend=self.backend)
        if self.group.size() > 1:
            largest_n = log_partition_n.clone()
            dist.all_reduce(largest_n, op=dist.ReduceOp.MAX, group=self.group)
            sums_2n = torch.stack([(log_partition_n - largest_n).exp_(), chosen_n])
            dist.all_reduce(sums_2n, group=self.group)
            log_partition_n, chosen_n = largest_n + sums_2n[0].log(), sums_2n[1]
        return log_partition_n, chosen_n

    def gradients(self, raw_nv: Tensor, targets_n: Tensor, *given: Tensor) -> Tensor:
        """The gradient of raw, which may be overwritten; given: log-partition, its gradient, that of the targets' logits."""
        return logit_gradients(raw_nv, targets_n - self.start, *given, self.real, self.cap, backend=self.backend)


class TokenLosses(torch.autograd.Function):
    """hidden (n, h), weight (v, h), targets (n) -> log-partition (n) and the targets' logits (n), both over all ranks.

    The gradient of ``hidden`` is this rank's share: the tensor-parallel region's entry adds the shares up.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, vocabulary: Vocabulary, chunk: int
    ) -> tuple[Tensor, Tensor]:
        parts, kept = [], []
        for hidden_ch, targets_c in zip(hidden_nh.split(chunk), targets_n.split(chunk), strict=True):
            raw_cv = hidden_ch @ weight_vh.t()
            parts.append(vocabulary.statistics(raw_cv, targets_c))
            if len(hidden_nh) <= chunk:
                kept.append(raw_cv)
        log_partition_n, chosen_n = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_nh, weight_vh, targets_n, log_partition_n)
        ctx.kept = kept
        ctx.vocabulary, ctx.chunk = vocabulary, chunk
        return log_partition_n, chosen_n

    @staticmethod
    def backward(ctx: Any, d_log_partition_n: Tensor, d_chosen_n: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_nh, weight_vh, targets_n, log_partition_n = ctx.saved_tensors
        vocabulary, chunk = ctx.vocabulary, ctx.chunk
        d_hidden_nh = torch.empty_like(hidden_nh)
        d_weight_vh: Tensor | None = None
        for start in range(0, len(hidden_nh), chunk):
            piece = slice(start, start + chunk)
            raw_cv = ctx.kept.pop() if ctx.kept else hidden_nh[piece] @ weight_vh.t()
            d_raw_cv = vocabulary.gradients(raw_cv, targets_n[piece], log_partition_n[piece], d_log_partition_n[piece], d_chosen_n[piece])
            torch.mm(d_raw_cv, weight_vh, out=d_hidden_nh[piece])
            share_vh = d_raw_cv.t() @ hidden_nh[piece]
            if len(hidden_nh) <= chunk:
                d_weight_vh = share_vh
            elif d_weight_vh is None:  # chunks are added up in fp32; a single one needs no sum
                d_weight_vh = share_vh.to(torch.promote_types(share_vh.dtype, torch.float32))
            else:
                d_weight_vh += share_vh
        return d_hidden_nh, d_weight_vh.to(weight_vh.dtype), None, None, None


class Head(ColumnParallelLinear):
    """The vocabulary's rows split over the tensor-parallel ranks; logits, or the losses of every token in chunks."""

    def __init__(self, config: SwaxTransformerConfig, *, weightless: bool) -> None:
        """weightless: the weight is the token embedding's, given with every call."""
        rows = padded_vocab_size(config.model.vocab_size)
        super().__init__(
            config.hidden_size,
            rows,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=weightless,
            tp_group=config.groups.tp,
        )
        start = config.groups.tp.rank() * (rows // config.groups.tp.size())
        real, cap = config.model.vocab_size - start, config.model.logit_cap
        self.vocabulary = Vocabulary(start, real, cap, config.groups.tp, config.kernels.backend)

    def forward(self, hidden_sbh: Tensor, weight_vh: Tensor | None, targets_bt: Tensor | None = None) -> Tensor:
        """Logits (s, b, v) fp32 or, with targets, (1 or 2, b, s) fp32: the cross-entropy and, where it is on, the z-loss."""
        if targets_bt is None:
            return self.vocabulary.logits(super().forward(hidden_sbh, weight=weight_vh)[0])
        weight_vh = self.weight if weight_vh is None else weight_vh
        hidden_sbh = enter_tensor_parallel(hidden_sbh, self.config)
        length, rows, _ = hidden_sbh.shape
        targets_n = targets_bt.transpose(0, 1).reshape(-1)
        chunk = self.config.loss_chunk or len(targets_n)
        log_partition_n, chosen_n = TokenLosses.apply(hidden_sbh.flatten(0, 1), weight_vh, targets_n, self.vocabulary, chunk)
        losses = [log_partition_n - chosen_n]
        if self.config.z_loss:
            losses.append(self.config.z_loss * log_partition_n.square())
        return torch.stack(losses).unflatten(1, (length, rows)).transpose(1, 2).contiguous()
