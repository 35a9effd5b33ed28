"""The few collectives a checkpoint needs; one process without torch.distributed is a group of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from swax_megatron.errors import RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that save or verify together."""

    rank: int
    size: int
    group: Any = None

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """Of a process group; None: the default group where torch.distributed is initialised, else this process alone."""
        if not dist.is_initialized():
            return cls(0, 1)
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def _leader(self) -> int:
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._leader(), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=self._leader(), group=self.group)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def together(ranks: Any, action: Callable[[], T], sentence: str) -> T:
    """Run ``action`` on every rank and return its result; where it fails on one, RunError on all, ``sentence`` and the cause.

    ranks: ``Ranks``, or whatever else has its all_gather
    """
    failure = result = None
    try:
        result = action()
    except Exception as error:  # every kind of store has errors of its own; reported to all ranks
        failure = f"rank {ranks.rank}: {error_text(error)}"
    first = next((each for each in ranks.all_gather(failure) if each is not None), None)
    if first is not None:
        raise RunError(f"{sentence} ({first})")
    return result  # type: ignore[return-value]


def error_text(error: Exception) -> str:
    """An error in one sentence; those of ours are sentences already."""
    return str(error) if isinstance(error, (ValueError, RunError)) else f"{type(error).__name__}: {error}"
