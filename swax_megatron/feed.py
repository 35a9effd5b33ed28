"""What a rank reads: its rows of every global batch as microbatches on its device, read ahead in the background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.distributed as dist

from swax_megatron.batching import batch_rows
from swax_megatron.data.mixture import Mixture, Plan, StreamState, replica_rows
from swax_megatron.data.packing import Batch, pack
from swax_megatron.data.prefetch import Prefetcher
from swax_megatron.errors import RunError
from swax_megatron.parallel.context import cut_rows
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config


class Feed:
    """Deals global batches out to ranks.

    Rows are dealt out contiguously. Every tensor-, pipeline- and context-parallel rank reads the same rows itself: they are a
    pure function of the plan, so nothing is broadcast and every rank knows all document boundaries. Under context parallelism
    a rank keeps its piece of them.
    """

    def __init__(self, config: Config, groups: Groups, data: Mixture) -> None:
        self.config, self.groups, self.data = config, groups, data
        self.eos_id = data.streams[0].dataset.eos_id
        self._prefetcher = Prefetcher(self._plan, self._load, config.data.workers, config.data.prefetch, config.train.steps)

    def take(self, state: StreamState, step: int) -> tuple[list[Batch], StreamState, int]:
        """This rank's microbatches of ``step``, the state of the data after it, and the global batch's tokens without padding.

        Raises RunError where the data cannot be read (any more), or is damaged.
        """
        try:
            loaded, after = self._prefetcher.take(state, step)
        except (OSError, ValueError) as error:
            raise RunError(f"step {step}: training data cannot be read ({error}); mend that and start the run again") from error
        return [self._to_device(batch) for batch, _ in loaded], after, self._count(step, sum(tokens for _, tokens in loaded))

    def read(self, plan: Plan, data: Mixture) -> list[Batch]:
        """This rank's microbatches of a plan, read now; RunError as ``take``."""
        try:
            return [self._to_device(self._pack(piece, data)[0]) for piece in self._pieces(plan)]
        except (OSError, ValueError) as error:
            raise RunError(f"data cannot be read ({error}); mend that and start the run again") from error

    def close(self) -> None:
        """Stop reading ahead."""
        self._prefetcher.close()

    def _plan(self, state: StreamState, step: int) -> tuple[list[Plan], StreamState]:
        plan, after = self.data.plan(state, batch_rows(self.config, step), step)
        return self._pieces(plan), after

    def _pieces(self, plan: Plan) -> list[Plan]:
        """This rank's rows of a plan, a list for each microbatch."""
        size, mine = self.config.train.micro_batch_size, replica_rows(plan, self.groups.replica, self.groups.replicas)
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _load(self, piece: Plan) -> tuple[Batch, int]:
        """Runs in a background thread: read, pack, and pin, so that the copy to the GPU waits for nothing."""
        batch, tokens = self._pack(piece, self.data)
        return (_each(batch, torch.Tensor.pin_memory) if self.groups.device.type == "cuda" else batch), tokens

    def _pack(self, piece: Plan, data: Mixture) -> tuple[Batch, int]:
        rows = data.load(piece)
        batch = pack(rows.ids_bt1, rows.mask_bt1, self.eos_id, self.config.model.document_boundary)
        return cut_rows(batch, self.groups.context), int(rows.tokens_b.sum())

    def _to_device(self, batch: Batch) -> Batch:
        return _each(batch, lambda tensor: tensor.to(self.groups.device, non_blocking=True))

    def _count(self, step: int, mine: int) -> int:
        """Tokens of the whole global batch; only padded rows have to be counted."""
        if self.config.data.packing == "concatenate":
            return batch_rows(self.config, step) * self.config.data.sequence_length
        total = torch.tensor(mine, device=self.groups.device)
        dist.all_reduce(total, group=self.groups.data)
        return int(total) // self.groups.context_size  # ranks that share rows have all counted them whole


def _each(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    return Batch(**{item.name: change(getattr(batch, item.name)) for item in fields(batch)})
