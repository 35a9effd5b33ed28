"""Gradients where autograd leaves them, and one launch for the whole update: ZeRO where nothing is divided over data-parallel ranks.

DeepSpeed's optimizer copies every gradient into float32, flattens them, scales them and copies the weights back, a pass over memory each.
On one data-parallel rank (or at stage 0) none of it is needed. Masters, moments and their places in a checkpoint stay DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from swax_megatron.kernels.documents import triton_missing
from swax_megatron.kernels.update import AdamW
from swax_megatron.optim.zero import WholeGradients
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config


def serves(config: Config, groups: Groups) -> bool:
    """Whether this backend can take the place of ZeRO's stages 0 and 1."""
    optimizer = config.optimizer
    whole = optimizer.zero_stage == 0 or (optimizer.zero_stage == 1 and groups.data_size == 1)
    plain = config.train.precision == "bf16" and not (optimizer.overlap_gradients or optimizer.offload)
    return whole and plain and config.kernels.backend != "reference" and triton_missing(groups.device) is None


class DirectUpdate(WholeGradients):
    """Stages 0 and 1 on a GPU. The first micro-batch's gradient stays in bf16; from the second on they are added up in fp32."""

    def __init__(self, config: Config, chunks: list[nn.Module], groups: Groups) -> None:
        super().__init__(config, chunks, groups)
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        self._zero._grad_acc_hooks = [parameter.register_post_accumulate_grad_hook(_add_up) for parameter in self._parameters]
        self._updates, self._norm_read = 0, 0.0
        self._begun: Tensor | None = None  # the gradients' norm on its way
        pieces = list(self._pieces())
        names = ("param", "exp_avg", "exp_avg_sq")
        decays = {id(parameter): group["weight_decay"] for parameter, group in self._grouped()}
        self._updated = [piece.parameter for piece in pieces]
        self._adamw = AdamW(
            [(*(piece.tensors[name].view(-1) for name in names), piece.parameter.data) for piece in pieces],
            [decays[id(parameter)] for parameter in self._updated],
        )

    def _grouped(self) -> Iterator[tuple[nn.Parameter, dict]]:
        for parameters, group in zip(self._zero.bit16_groups, self._zero.optimizer.param_groups, strict=True):
            yield from ((parameter, group) for parameter in parameters)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """In fp32, for sums over ranks; what no sum needs stays as it is."""
        parameter.grad_accum = parameter.grad_accum.float()
        return parameter.grad_accum

    def _reduce(self) -> None:
        self._reduce_over_model_parallel_ranks()
        if self._config.optimizer.zero_stage == 0 and self._groups.data_size > 1:
            self._average_over_data_ranks()

    def _partition_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        yield from ((parameter, parameter.grad_accum) for parameter in self._updated)

    def begin_reduce(self) -> None:
        self._reduce()
        self._begun = self._norm()
        self._adamw.ready([parameter.grad_accum for parameter in self._updated])

    def reduce(self) -> float:
        if self._begun is None:
            self.begin_reduce()
        self._norm_read, self._begun = float(self._begun), None
        return self._norm_read

    def update(self, learning_rate: float) -> None:
        optimizer = self._config.optimizer
        self._updates += 1
        clip = (self._norm_read + 1e-6) / optimizer.clip_grad if optimizer.clip_grad else 1.0
        self._adamw(learning_rate, (optimizer.beta1, optimizer.beta2), optimizer.eps, self._updates, 1.0 / max(clip, 1.0))
        self.zero_grad(0)

    def zero_grad(self, microbatches: int) -> None:
        for parameter in self._parameters:
            parameter.grad = parameter.grad_accum = None
        self._adamw.forget()
        self._begun = None

    def discard(self) -> None:
        self.zero_grad(0)

    def loaded(self, updates: int) -> None:
        super().loaded(updates)
        self._updates = updates


@torch.no_grad()
def _add_up(parameter: nn.Parameter) -> None:
    gradient, parameter.grad = parameter.grad, None
    if parameter.grad_accum is None:
        parameter.grad_accum = gradient.contiguous()
    else:
        parameter.grad_accum = parameter.grad_accum.float().add_(gradient)
