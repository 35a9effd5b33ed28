"""The chunked losses: equal to the plain formula in fp64, values and gradients, and never all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, HIDDEN, ROWS, REAL = 37, 8, 96, 85  # the vocabulary's last rows are padding; 37 is no multiple of a chunk


class Largest(TorchDispatchMode):
    """The most elements that any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def plain(hidden_nh: Tensor, weight_vh: Tensor, targets_n: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-partition of every token by autograd over all logits."""
    logits_nv = hidden_nh @ weight_vh.t()
    if cap:
        logits_nv = cap * torch.tanh(logits_nv / cap)
    logits_nv = logits_nv[:, :REAL]
    return F.cross_entropy(logits_nv, targets_n, reduction="none"), logits_nv.logsumexp(-1)


def compare(cap: float | None, chunk: int, dtype: str) -> tuple[float, int]:
    """The largest relative difference of losses and gradients, and the largest tensor; a task for a pool of 1 or 2 ranks."""
    from swax_megatron.model.head import TokenLosses, Vocabulary

    random = torch.Generator().manual_seed(3)
    kind = getattr(torch, dtype)
    hidden_nh = torch.randn(TOKENS, HIDDEN, generator=random).to(kind)
    weight_vh = torch.randn(ROWS, HIDDEN, generator=random).to(kind)
    targets_n = torch.randint(0, REAL, (TOKENS,), generator=random)
    upstream_2n = torch.randn(2, TOKENS, generator=random).to(torch.promote_types(kind, torch.float32))

    expected_hidden, expected_weight = (tensor.double().clone().requires_grad_() for tensor in (hidden_nh, weight_vh))
    entropy_n, log_partition_n = plain(expected_hidden, expected_weight, targets_n, cap)
    ((torch.stack([entropy_n, log_partition_n.square()]) * upstream_2n).sum()).backward()

    group, rank = dist.group.WORLD, dist.get_rank()
    share = ROWS // group.size()
    hidden, weight = hidden_nh.clone().requires_grad_(), weight_vh[rank * share : (rank + 1) * share].clone().requires_grad_()
    vocabulary = Vocabulary(rank * share, REAL - rank * share, cap, group)
    with Largest() as largest:
        partition_n, chosen_n = TokenLosses.apply(hidden, weight, targets_n, vocabulary, chunk)
        ((torch.stack([partition_n - chosen_n, partition_n.square()]) * upstream_2n).sum()).backward()
    d_hidden = hidden.grad.double()
    dist.all_reduce(d_hidden, group=group)  # what leaving the tensor-parallel region does
    pairs = [
        (partition_n - chosen_n, entropy_n),
        (partition_n, log_partition_n),
        (d_hidden, expected_hidden.grad),
        (weight.grad, expected_weight.grad[rank * share : (rank + 1) * share]),
    ]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs), largest.elements


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [5, TOKENS])
def test_losses_and_gradients_equal_the_plain_formula(chunk: int, cap: float | None, ranks: int, workers: Any) -> None:
    """fp64: to rounding. The cap of 2 bends most logits; the upstream gradient differs for every token and both losses."""
    for difference, _ in workers(ranks).run(in_group, compare, cap, chunk, "float64"):
        assert difference < 1e-13


def test_bf16_weights_lose_nothing_to_the_chunks(workers: Any) -> None:
    """Chunks of the weight's gradient are added up in fp32: many are no worse than one."""
    many, one = (workers(1).run(in_group, compare, 2.0, chunk, "bfloat16")[0][0] for chunk in (2, TOKENS))
    assert many < 1.5 * one < 3e-2


def test_all_logits_never_exist_at_once(ranks: int, workers: Any) -> None:
    """With chunks of 5 tokens the largest tensor is the weight's gradient; without, it is the logits."""
    rows = ROWS // ranks
    for _, elements in workers(ranks).run(in_group, compare, 2.0, 5, "float64"):
        assert elements <= max(rows * HIDDEN, 5 * rows) < TOKENS * rows
    for _, elements in workers(ranks).run(in_group, compare, 2.0, TOKENS, "float64"):
        assert elements == TOKENS * rows


def in_group(function: Any, *arguments: Any) -> Any:
    """Run a task where the pool's process group exists, whichever test comes first."""
    if not dist.is_initialized():
        from swax_megatron.parallel.device import collective_backend

        dist.init_process_group(collective_backend())
    return function(*arguments)
