"""Where the time of a training step goes: a profile of it, with every kernel counted to a part of the model.

A kernel belongs to the part whose forward pass launched it. In backward, autograd's node carries the sequence number of the forward
operation that made it, and so belongs to that operation's part. What recomputation runs again counts to the part that asks for it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

MARK = "part:"
OTHER = "residuals and the rest"


@contextlib.contextmanager
def marked(modules: dict[nn.Module, str], calls: dict[tuple[Any, str], str]) -> Iterator[None]:
    """Name parts while this lasts. modules: part of each module's forward pass; calls: part of (object, method)."""
    handles, ranges = [], []

    def enter(part: str) -> Callable:
        def hook(*_: Any) -> None:
            ranges.append(record_function(MARK + part))
            ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    for module, part in modules.items():
        handles += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]

    def wrapped(method: Callable, part: str) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            with record_function(MARK + part):
                return method(*arguments, **named)

        return call

    for (owner, method), part in calls.items():
        setattr(owner, method, wrapped(getattr(owner, method), part))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, method in calls:
            delattr(owner, method)  # the class's own again


def measure(run: Callable[[], None], cuda: bool) -> dict[str, Any]:
    """Profile ``run()`` once. Seconds by part are of the GPU's kernels; without one, of the CPU's operations.

    Returns parts {name: s}, busy_s (at least one kernel runs), kernels (how many), slowest {name of kernel: s},
    operations {part / operations that launched it, from the inside out: s}.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    owned = owners(profiler)
    seconds: dict[str, float] = defaultdict(float)
    slowest: dict[str, float] = defaultdict(float)
    if not cuda:
        for _, part, own in owned:
            seconds[part] += own / 1e9
        return {"parts": _sorted(seconds), "busy_s": sum(seconds.values()), "kernels": 0, "slowest": {}, "operations": {}}
    paths = _paths([event for event, _, _ in owned])
    by_correlation = {event.correlation_id(): (part, paths[id(event)]) for event, part, _ in owned if event.correlation_id()}
    spans, operations = [], defaultdict(float)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != DeviceType.CUDA or event.is_user_annotation():
            continue
        part, path = by_correlation.get(event.linked_correlation_id(), (OTHER, ""))
        seconds[part] += event.duration_ns() / 1e9
        operations[f"{part} / {path or event.name()[:40]}"] += event.duration_ns() / 1e9
        slowest[event.name()[:90]] += event.duration_ns() / 1e9
        spans.append((event.start_ns(), event.end_ns()))
    longest, heaviest = (dict(list(_sorted(table).items())[:40]) for table in (slowest, operations))
    return {
        "parts": _sorted(seconds),
        "busy_s": union(spans) / 1e9,
        "kernels": len(spans),
        "slowest": longest,
        "operations": heaviest,
    }


def idle(run: Callable[[], Any], times: int = 3) -> tuple[float, list[tuple[float, str, str]]]:
    """The share of wall time in which no kernel of the GPU runs, and the longest pauses: ms, the kernel before, the kernel after.

    Only kernels are recorded, so that recording costs little.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = profiler.profiler.kineto_results.events()
    kernels = [event for event in events if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()]
    busy = union([(event.start_ns(), event.end_ns()) for event in kernels]) / 1e9
    pauses, last = [], None
    for event in sorted(kernels, key=lambda event: event.start_ns()):
        if last is not None and event.start_ns() > last.end_ns():
            pauses.append(((event.start_ns() - last.end_ns()) / 1e6, last.name()[:60], event.name()[:60]))
        if last is None or event.end_ns() > last.end_ns():
            last = event
    longest = sorted(pauses, reverse=True)[: 5 * times]
    return 1.0 - busy / seconds, [(round(length, 3), before, after) for length, before, after in longest]


def _paths(events: list[Any]) -> dict[int, str]:
    """Of every event of the CPU, the names of the operations around it (four at most), from the inside out."""
    names: dict[int, tuple[str, ...]] = {}
    stacks: dict[int, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        stack = stacks[event.start_thread_id()]
        while stack and stack[-1].end_ns() <= event.start_ns():
            stack.pop()
        around = names[id(stack[-1])] if stack else ()
        known = event.name().startswith((MARK, "cu", "autograd::engine"))
        names[id(event)] = around if known else (event.name()[:40], *around)[:4]
        stack.append(event)
    return {key: " < ".join(path) for key, path in names.items()}


def owners(profiler: profile) -> list[tuple[Any, str, int]]:
    """Every event of the CPU, its part, and its nanoseconds without those of the events inside it."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.device_type() == DeviceType.CPU]
    part_of: dict[int, str] = {}
    own = {id(event): event.duration_ns() for event in events}
    made_in: dict[tuple[int, int], str] = {}  # (thread, sequence number) of forward operations
    stacks: dict[int, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        stack = stacks[event.start_thread_id()]
        while stack and stack[-1].end_ns() <= event.start_ns():
            stack.pop()
        part = part_of[id(stack[-1])] if stack else OTHER
        if stack:
            own[id(stack[-1])] -= event.duration_ns()
        if event.name().startswith(MARK):
            part = event.name().removeprefix(MARK)
        elif event.sequence_nr() >= 0:
            if event.fwd_thread_id():  # autograd's node for a forward operation
                part = made_in.get((event.fwd_thread_id(), event.sequence_nr()), part)
            else:
                made_in.setdefault((event.start_thread_id(), event.sequence_nr()), part)
        part_of[id(event)] = part
        stack.append(event)
    return [(event, part_of[id(event)], own[id(event)]) for event in events]


def _sorted(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])}


def union(spans: list[tuple[int, int]]) -> int:
    """Nanoseconds that the (start, end) spans cover."""
    total = reached = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
