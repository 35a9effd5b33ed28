"""The profile of a training step: forward, backward and recomputed work counts to the part that asked for it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.step_parts import OTHER, marked, owners


class Twice(torch.autograd.Function):
    """A product with itself; backward does four such products under its own node."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy @ x.t() + x.t() @ dy + 1e-9 * (x @ x @ x)


class Heavy(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(Twice.apply, x, use_reentrant=True) if self.recompute else Twice.apply(x)


def products(recompute: bool) -> Counter:
    """Matrix products by part of the second of two steps."""
    heavy, light = Heavy(recompute), nn.Linear(8, 8)

    class Step:
        def update(self) -> None:
            torch.ones(8, 8).mm(torch.ones(8, 8))

    step, x = Step(), torch.randn(8, 8, requires_grad=True)

    def run() -> None:
        (light(heavy(x)) @ torch.ones(8, 8)).square().sum().backward()
        step.update()

    run()
    with marked({heavy: "heavy", light: "light"}, {(step, "update"): "update"}), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    assert "update" not in vars(step), "the class's own method must come back"
    return Counter(part for event, part, _ in owners(profiler) if event.name() in ("aten::mm", "aten::addmm"))


def test_work_counts_to_the_part_that_asked_for_it() -> None:
    plain = {"heavy": 1 + 4, "light": 1 + 2, "update": 1, OTHER: 1 + 1}  # forward + backward
    assert products(recompute=False) == plain
    assert products(recompute=True) == plain | {"heavy": 1 + 1 + 4}  # forward again within backward


def test_time_is_counted_once() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.randn(64, 64).softmax(-1).sum()
    owned = owners(profiler)
    outermost, reached = 0, -1
    for event in sorted((event for event, _, _ in owned), key=lambda event: (event.start_ns(), -event.duration_ns())):
        if event.start_ns() >= reached:
            outermost, reached = outermost + event.duration_ns(), event.end_ns()
    assert len(owned) > 3 and sum(own for _, _, own in owned) == outermost
