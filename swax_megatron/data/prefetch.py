"""Loading in background threads, in exact order and with bounded memory.

A step's work is planned from the state before it, cut into pieces, and the pieces are loaded by a pool of threads while earlier
steps run. What ``take`` gives depends on its arguments alone: a caller that goes on from another state than the one that was
foreseen (after a resume, or data skipped by hand) gets that state's data, and what was loaded for nothing is dropped.
Threads are enough: reading costs a small share of a core, and downloads, copies and hashes run outside the interpreter's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State")
Piece = TypeVar("Piece")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class _Step(Generic[State, Loaded]):
    number: int
    before: State
    after: State
    loading: list[Future]


class Prefetcher(Generic[State, Piece, Loaded]):
    """plan: (state, step) -> the step's pieces and the state after it; pure.  load: a piece -> what it holds, in any thread.

    workers: threads; 0 loads in the caller's.  ahead: steps that are loaded before they are asked for; memory holds at most
    ``ahead`` + 1 steps.  end: the first step that is never asked for.
    """

    def __init__(
        self,
        plan: Callable[[State, int], tuple[Sequence[Piece], State]],
        load: Callable[[Piece], Loaded],
        workers: int,
        ahead: int,
        end: int,
    ) -> None:
        self._plan, self._load, self._ahead, self._end = plan, load, ahead if workers else 0, end
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._steps: deque[_Step[State, Loaded]] = deque()

    def take(self, state: State, step: int) -> tuple[list[Loaded], State]:
        """The pieces of ``step``, loaded, in order, and the state after it. Raises what ``load`` raised for one of them."""
        if self._pool is None:
            pieces, after = self._plan(state, step)
            return [self._load(piece) for piece in pieces], after
        if self._steps and (self._steps[0].number, self._steps[0].before) != (step, state):
            self._drop()
        if not self._steps:
            self._begin(step, state)
        while len(self._steps) <= self._ahead and self._steps[-1].number + 1 < self._end:
            self._begin(self._steps[-1].number + 1, self._steps[-1].after)
        wanted = self._steps.popleft()
        try:
            return [loading.result() for loading in wanted.loading], wanted.after
        except BaseException:
            self._drop()
            raise

    def _begin(self, step: int, state: State) -> None:
        pieces, after = self._plan(state, step)
        self._steps.append(_Step(step, state, after, [self._pool.submit(self._load, piece) for piece in pieces]))

    def _drop(self) -> None:
        for step in self._steps:
            for loading in step.loading:
                loading.cancel()
        self._steps.clear()

    def close(self) -> None:
        """Stop the threads; what they are loading is dropped."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
