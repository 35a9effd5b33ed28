"""Processes that encode segments and join shards; which of them does what never changes what is written."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from data_prep.encoders import Encoder
from data_prep.encoding import Counts, EncodeOptions, SegmentEncoder
from data_prep.joining import Group, join
from data_prep.segments import Segment, Task
from data_prep.workfolder import WorkFolder

Job = Segment | Group


class Worker:
    """Does jobs in this process, with the encoder given or, without one, that of the options."""

    def __init__(self, options: EncodeOptions, work: WorkFolder, encoder: Encoder | None = None) -> None:
        self._options, self._work, self._made = options, work, encoder
        self._encoder: SegmentEncoder | None = None

    def do(self, job: Job, report: Callable[[Counts], None]) -> dict[str, Any]:
        """The record of a segment, or the entry of a joined shard."""
        if isinstance(job, Group):
            return join(job, self._work)
        if self._encoder is None:
            self._encoder = SegmentEncoder(self._options, self._work, self._made)
        return self._encoder(job, report)


class _Process:
    """A worker in a process of its own, at the other end of a pipe.

    It is a fork, which has the encoder and all modules at once (two seconds of processor time each), where no other thread
    runs that could hold a lock, such as that of a remote file system; else it begins anew and makes its own encoder.
    """

    def __init__(self, options: EncodeOptions, work: WorkFolder, encoder: Encoder | None, others: list[Connection]) -> None:
        """others: the pipes of earlier processes."""
        forked = threading.active_count() == 1
        context = multiprocessing.get_context("fork" if forked else "spawn")
        self.pipe, theirs = context.Pipe()
        inherited = (encoder, [*others, self.pipe]) if forked else (None, [])
        self.process = context.Process(target=_serve, args=(theirs, options, work, *inherited), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None


def _serve(pipe: Connection, options: EncodeOptions, work: WorkFolder, encoder: Encoder | None, others: list[Connection]) -> None:
    """Do what comes through the pipe until the parent closes it. others: the parent's ends of pipes, where they were inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for each in others:
        each.close()  # only the parent may hold them: that they are closed tells every child that it is gone
    worker = Worker(options, work, encoder)
    try:
        while True:
            job = pipe.recv()
            try:
                pipe.send(("done", worker.do(job, lambda counts: pipe.send(("counts", counts)))))
            except (BrokenPipeError, ConnectionResetError):
                return
            except (ValueError, OSError) as error:
                pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@dataclass
class _OpenTask:
    """A task whose segments are being handed out."""

    task: Task
    missing: deque[int]
    further: int | None  # the next index after the missing ones; None where their number is known
    started: bool = False
    fetched: bool = True
    ended: bool = False
    running: int = 0

    def all_given(self) -> bool:
        """Whether no segment is left."""
        return self.ended or not (self.missing or self.further is not None)

    def left(self) -> bool:
        """Whether a worker can be given another segment now."""
        return not self.all_given() and (self.fetched or not self.started)

    def take(self) -> Segment:
        """The next segment."""
        self.started = True
        self.running += 1
        if self.missing:
            return Segment(self.task, self.missing.popleft())
        index, self.further = self.further, self.further + 1
        return Segment(self.task, index)


class _Queue:
    """Which segment comes next. No call looks at all tasks: there may be hundreds of thousands of files."""

    def __init__(self, tasks: Iterable[_OpenTask]) -> None:
        self.by_number = {each.task.number: each for each in tasks}
        self._fresh = deque(self.by_number.values())
        self._begun: list[_OpenTask] = []
        self._last: dict[_Process | None, _OpenTask] = {}

    def next(self, process: _Process | None) -> Segment | None:
        """Go on with the worker's own task; else begin a new one; else help with the first that has segments left."""
        chosen = self._last.get(process)
        if chosen is None or not chosen.left():
            if self._fresh:
                chosen = self._fresh.popleft()
                self._begun.append(chosen)
            else:
                self._begun = [each for each in self._begun if not each.all_given()]
                chosen = next((each for each in self._begun if each.left()), None)
        if chosen is None:
            return None
        self._last[process] = chosen
        return chosen.take()


@dataclass
class Pool:
    """Runs jobs in ``workers`` processes (1: in this one). encoder: that of ``options``, where it was made already."""

    options: EncodeOptions
    work: WorkFolder
    workers: int
    encoder: Encoder | None = None
    _processes: list[_Process] = field(default_factory=list)
    _alone: Worker | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes: an unfinished segment is begun anew by the next run."""
        for each in self._processes:
            each.pipe.close()
            each.process.kill()
        for each in self._processes:
            each.process.join()

    def encode(self, todo: Iterable[tuple[Task, list[int], int | None]], report: Callable[[Counts], None]) -> int:
        """Encode the missing segments of tasks, given as (task, missing indices, first index of an unknown number more).

        Returns how many documents were compared with sentencepiece. The error of the first segment in order is raised, of
        those that were begun.
        """
        queue = _Queue(
            _OpenTask(task, deque(missing), further, fetched=not task.remote or task.segments == 1) for task, missing, further in todo
        )
        checked = 0
        for job, record in self._run(queue.next, report):
            state = queue.by_number[job.task.number]
            state.running, state.fetched = state.running - 1, True
            state.ended |= record["end"]
            checked += record["checked"]
            if state.task.remote and not state.running and not state.left():
                self.work.forget(state.task)
        return checked

    def join(self, groups: list[Group], report: Callable[[dict[str, Any]], None]) -> dict[str, dict[str, Any]]:
        """Write the joined shards; their entries by the groups' names. ``report`` is called with each entry."""
        left, entries = deque(groups), {}
        for job, entry in self._run(lambda _: left.popleft() if left else None, lambda _: None):
            entries[job.name] = entry
            report(entry)
        return entries

    def _run(self, pick: Callable[[_Process | None], Job | None], report: Callable[[Counts], None]) -> Iterator[tuple[Job, dict[str, Any]]]:
        if self.workers == 1:
            self._alone = self._alone or Worker(self.options, self.work, self.encoder)
            while (job := pick(None)) is not None:
                yield job, self._alone.do(job, report)
            return
        errors: dict[tuple[int, ...], Exception] = {}
        while True:
            for process in self._idle() if not errors else ():
                if (job := pick(process)) is None:
                    break
                process.job = job
                try:
                    process.pipe.send(job)
                except OSError as error:
                    raise _died() from error
            busy = {process.pipe: process for process in self._processes if process.job is not None}
            if not busy:
                break
            for pipe in wait(list(busy)):
                process = busy[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise _died() from error
                if kind == "counts":
                    report(content)
                else:
                    job, process.job = process.job, None
                    if kind == "error":
                        errors[job.place] = content
                    else:
                        yield job, content
        if errors:
            raise errors[min(errors)]

    def _idle(self) -> Iterator[_Process]:
        """Processes without a job; a new one is started while there may be more."""
        for process in self._processes:
            if process.job is None:
                yield process
        while len(self._processes) < self.workers:
            process = _Process(self.options, self.work, self.encoder, [each.pipe for each in self._processes])
            self._processes.append(process)
            yield process


def _died() -> ValueError:
    return ValueError("a tokenising process died, most likely killed for memory; try fewer --workers")
