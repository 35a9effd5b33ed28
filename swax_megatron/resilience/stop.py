"""Stopping in time: a signal or a stop file on any rank ends the run on all ranks at the same step.

A signal handler only takes a note. The ranks compare their notes (one all-reduce of an integer over gloo) between steps
and inside validation; what follows, one save and exit code 75, is ordinary code. Signals may come twice, to some ranks
only, or while a checkpoint is written: a note that is there stays as it is.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from swax_megatron.resilience import STOP_FILE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "stop file")


class StopRequest:
    """Whether this run was told to stop. ``reason``: a signal's name or "stop file"; None: nobody asked on this rank."""

    def __init__(self, run_dir: str | Path | None = None) -> None:
        self.file = Path(run_dir) / STOP_FILE if run_dir else None
        self.reason: str | None = None
        self.agreed = False  # every rank knows: no rank begins another step

    def install(self) -> None:
        """Catch the signals from now on (main thread only)."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def agree(self, group: dist.ProcessGroup) -> bool:
        """Whether any rank was told to stop: the same answer on every rank of a gloo group (a collective)."""
        if self.agreed:
            return True
        if dist.get_rank() == 0 and self.reason is None and self.file is not None and self.file.exists():
            self.reason = REASONS[-1]
        told = torch.tensor([0 if self.reason is None else 1 + REASONS.index(self.reason)], dtype=torch.int32)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
        self.agreed = bool(told.item())
        if self.agreed:
            self.reason = REASONS[told.item() - 1]  # of whichever rank
        return self.agreed

    def finish(self, group: dist.ProcessGroup) -> None:
        """Leave together: torch's agent gives the ranks that outlive the first one a second signal and 30 seconds."""
        for number in SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_IGN)  # survives into the interpreter's end, a Python handler does not
        dist.barrier(group=group)
