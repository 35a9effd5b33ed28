"""Loss by position: what a model makes of the text before a token, and how many tokens have more than a window of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from swax_megatron.data.packing import Batch
from swax_megatron.data.positions import position_edges
from swax_megatron.parallel.groups import Groups


class LossByPosition:
    """Sums over the microbatches of a pass: of every range of positions its nats and targets, and the targets beyond a window.

    A position counts the tokens that memory and attention have before them: of the document, as far as it lies in the row; with
    ``document_boundary: carry`` of the row.
    """

    def __init__(self, length: int, window: int, groups: Groups) -> None:
        self.edges, self.window, self.groups = position_edges(length), window, groups
        self.sums = torch.zeros(2 * len(self.edges) - 1, dtype=torch.float64, device=groups.device)  # nats, targets, beyond
        self.counts = groups.is_last_stage and groups.tensor_rank == 0  # tensor-parallel ranks all have the same losses

    def add(self, losses_bt: Tensor, batch: Batch) -> None:
        """losses_bt: nats of every token of a microbatch."""
        if not self.counts:
            return
        position, targets = batch.positions_bt, batch.loss_mask_bt.double()
        nats = losses_bt.detach().double() * targets
        inside = [(position >= low) & (position < high) for low, high in zip(self.edges, self.edges[1:], strict=False)]
        parts = [(values * place).sum() for values in (nats, targets) for place in inside]
        self.sums += torch.stack([*parts, (targets * (position >= self.window)).sum()])

    def metrics(self) -> dict[str, float]:
        """By TensorBoard name, over all ranks: ``loss/by_position/000064`` for every range that has targets. Collective."""
        dist.all_reduce(self.sums)
        ranges = len(self.edges) - 1
        nats, targets, (beyond,) = (part.tolist() for part in self.sums.split([ranges, ranges, 1]))
        found = {
            f"loss/by_position/{low:06}": nat / count for low, nat, count in zip(self.edges, nats, targets, strict=False) if count
        }
        return found | {"validation/beyond_window": beyond / max(sum(targets), 1.0)}
