"""The ranks that share a row, in the order of their pieces, and the transfers between them (counted in bytes)."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor


class ContextRanks:
    """The context-parallel group of this rank: rank r holds tokens [r * L, (r + 1) * L) of every row.

    bytes_sent: what this rank sent to others so far, by kind of message. A pass without gradients, a forward pass, its
    recomputation and a backward pass all count.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.bytes_sent: Counter[str] = Counter()
        self._world_ranks = dist.get_process_group_ranks(group)
        self._through_host = dist.get_backend(group) == "gloo"  # gloo cannot send a CUDA tensor to one peer

    def exchange(self, kind: str, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> None:
        """Send tensors to ranks of the group and fill others with what ranks send; at most one message a pair and direction.

        Every rank calls it at the same place; who has neither neighbour passes empty lists. Blocks (on a GPU: the current
        stream) until the received tensors may be read.
        """
        out = [(peer, self._staged(tensor.contiguous())) for peer, tensor in sends]
        into = [(peer, torch.empty_like(tensor, device="cpu") if self._staging(tensor) else tensor) for peer, tensor in receives]
        operations = [dist.P2POp(dist.isend, tensor, self._world_ranks[peer], self.group) for peer, tensor in out]
        operations += [dist.P2POp(dist.irecv, tensor, self._world_ranks[peer], self.group) for peer, tensor in into]
        self.bytes_sent[kind] += sum(tensor.nbytes for _, tensor in out)
        if not operations:
            return
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for (_, wanted), (_, received) in zip(receives, into, strict=True):
            if received is not wanted:
                wanted.copy_(received)

    def all_gather(self, kind: str, tensor: Tensor) -> Tensor:
        """(P, ...): every rank's tensor, in the order of the pieces. For small tensors."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        self.bytes_sent[kind] += tensor.nbytes * (self.size - 1)
        return torch.stack(parts)

    def _staging(self, tensor: Tensor) -> bool:
        return self._through_host and tensor.is_cuda

    def _staged(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._staging(tensor) else tensor
