"""The output head and the losses of every token, without ever holding all logits.

Tokens are taken in chunks: the logits of a chunk are computed, capped, masked and reduced to two numbers a token (the
log-partition and the target's logit), then forgotten; backward computes them again, chunk by chunk. That is one more
product with the head's weight, against 4 bytes x tokens x vocabulary of fp32 logits, kept several times over.

Legend: s sequence, b batch, h hidden, n = s * b tokens, c tokens of a chunk, v vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

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

    def logits(self, raw_nv: Tensor) -> Tensor:
        """Logits in fp32 or wider: the soft cap first, then -inf on the vocabulary's padding, which can then never take probability."""
        logits_nv = raw_nv.to(torch.promote_types(raw_nv.dtype, torch.float32))
        if self.cap:
            logits_nv = self.cap * torch.tanh(logits_nv / self.cap)
        if self.real < logits_nv.shape[-1]:
            padding_v = torch.arange(logits_nv.shape[-1], device=logits_nv.device) >= self.real
            logits_nv = logits_nv.masked_fill(padding_v, float("-inf"))
        return logits_nv

    def local_targets(self, targets_n: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Row of every target in this rank's shard (0 where it lies elsewhere), and whether it lies here."""
        local_n = targets_n - self.start
        here_n = (local_n >= 0) & (local_n < rows)
        return local_n.masked_fill(~here_n, 0), here_n


class TokenLosses(torch.autograd.Function):
    """hidden (n, h), weight (v, h), targets (n) -> log-partition (n) and the targets' logits (n), both over all ranks.

    The gradient of ``hidden`` is this rank's share: the tensor-parallel region's entry adds the shares up.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, vocabulary: Vocabulary, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_partitions, chosen = [], []
        for hidden_ch, targets_c in zip(hidden_nh.split(chunk), targets_n.split(chunk), strict=True):
            logits_cv = vocabulary.logits(hidden_ch @ weight_vh.t())
            local_c, here_c = vocabulary.local_targets(targets_c, logits_cv.shape[-1])
            chosen_c = logits_cv.gather(-1, local_c.unsqueeze(-1)).squeeze(-1).masked_fill(~here_c, 0.0)
            if vocabulary.group.size() == 1:
                log_partitions.append(logits_cv.logsumexp(-1))
            else:
                largest_c = logits_cv.amax(-1)
                dist.all_reduce(largest_c, op=dist.ReduceOp.MAX, group=vocabulary.group)
                sums_2c = torch.stack([logits_cv.sub_(largest_c.unsqueeze(-1)).exp_().sum(-1), chosen_c])
                dist.all_reduce(sums_2c, group=vocabulary.group)
                log_partitions.append(largest_c + sums_2c[0].log())
                chosen_c = sums_2c[1]
            chosen.append(chosen_c)
        log_partition_n, chosen_n = torch.cat(log_partitions), torch.cat(chosen)
        ctx.save_for_backward(hidden_nh, weight_vh, targets_n, log_partition_n)
        ctx.vocabulary, ctx.chunk = vocabulary, chunk
        return log_partition_n, chosen_n

    @staticmethod
    def backward(ctx: Any, d_log_partition_n: Tensor, d_chosen_n: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_nh, weight_vh, targets_n, log_partition_n = ctx.saved_tensors
        vocabulary, chunk = ctx.vocabulary, ctx.chunk
        d_hidden_nh = torch.empty_like(hidden_nh)
        # chunks are added up in fp32; a single one needs no sum
        sum_type = torch.promote_types(weight_vh.dtype, torch.float32) if len(hidden_nh) > chunk else weight_vh.dtype
        d_weight_vh = torch.zeros_like(weight_vh, dtype=sum_type)
        for start in range(0, len(hidden_nh), chunk):
            piece = slice(start, start + chunk)
            hidden_ch = hidden_nh[piece]
            logits_cv = vocabulary.logits(hidden_ch @ weight_vh.t())
            local_c, here_c = vocabulary.local_targets(targets_n[piece], logits_cv.shape[-1])
            # d log-partition / d logit is the probability; d chosen / d logit is 1 at the target
            d_logits_cv = (logits_cv - log_partition_n[piece].unsqueeze(-1)).exp_().mul_(d_log_partition_n[piece].unsqueeze(-1))
            rows_c = torch.arange(len(local_c), device=local_c.device)
            d_logits_cv[rows_c, local_c] += d_chosen_n[piece].masked_fill(~here_c, 0.0)
            if vocabulary.cap:  # the derivative of c * tanh(x / c); padding has none
                slope_cv = 1.0 - (logits_cv / vocabulary.cap).square_()
                d_logits_cv.mul_(slope_cv.masked_fill_(torch.isinf(slope_cv), 0.0))
            d_raw_cv = d_logits_cv.to(hidden_nh.dtype)
            d_hidden_nh[piece] = d_raw_cv @ weight_vh
            d_weight_vh += d_raw_cv.t() @ hidden_ch
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
        self.vocabulary = Vocabulary(start, config.model.vocab_size - start, config.model.logit_cap, config.groups.tp)

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
