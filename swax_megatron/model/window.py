"""The stochastic window (arXiv 2509.24552) as a pure function of (seed, step).

Nothing is broadcast and nothing is checkpointed: every rank, stage, microbatch and recomputation computes the same
window, and a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from swax_megatron import randomness
from swax_megatron.errors import RunError
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import Config


@dataclass(frozen=True)
class WindowSchedule:
    """The window of every layer at every step.

    kinds: one letter a layer (model.pattern expanded); only S layers have a window, F layers see the whole row
    steps: optimizer updates of the whole run; annealing begins at ceil((1 - anneal_fraction) * steps)
    """

    kinds: str
    schedule: str
    windows: tuple[int, ...]
    probabilities: tuple[float, ...]
    anneal_fraction: float
    anneal_window: int
    per_layer: bool
    steps: int
    seed: int
    sequence_length: int

    @classmethod
    def from_config(cls, config: Config) -> WindowSchedule:
        window = config.window
        return cls(
            kinds=parse_pattern(config.model.pattern),
            schedule=window.schedule,
            windows=tuple(window.windows),
            probabilities=tuple(window.probabilities),
            anneal_fraction=window.anneal_fraction,
            anneal_window=window.anneal_window,
            per_layer=window.per_layer,
            steps=config.train.steps,
            seed=config.train.window_seed,
            sequence_length=config.data.sequence_length,
        )

    @property
    def anneal_start(self) -> int:
        """The first annealed step (0-based)."""
        # the product is rounded first: 0.9 * 1000 must not become 900.0000000000001 and ceil to 901
        return math.ceil(round((1.0 - self.anneal_fraction) * self.steps, 6))

    def window(self, step: int, layer: int = 0) -> int:
        """The window that an S layer uses at a step (the same for all layers unless per_layer)."""
        if step >= self.anneal_start:
            return self.anneal_window
        if self.schedule == "fixed":
            return self.windows[0]
        if self.schedule == "ramp":
            return self.windows[min(step * len(self.windows) // max(self.anneal_start, 1), len(self.windows) - 1)]
        counters = (step, layer) if self.per_layer else (step,)
        return self.windows[randomness.choice(self.probabilities, "window", self.seed, *counters)]

    def layers(self, step: int) -> tuple[int, ...]:
        """The window of every layer at a step; an F layer's is the sequence length."""
        return self.expand([self.window(step, layer) for layer in range(len(self.kinds))])

    def attention_windows(self, step: int) -> tuple[int, ...]:
        """The windows of the S layers at a step; without S layers, the one that they would have."""
        windows = tuple(window for kind, window in zip(self.kinds, self.layers(step), strict=True) if kind == "S")
        return windows or (min(self.window(step), self.sequence_length),)

    def expand(self, window: int | list[int]) -> tuple[int, ...]:
        """One window (or one a layer) -> the window of every layer, clipped to the sequence."""
        each = [window] * len(self.kinds) if isinstance(window, int) else window
        full = self.sequence_length
        return tuple(full if kind == "F" else min(w, full) for kind, w in zip(self.kinds, each, strict=True))

    def fingerprint(self) -> int:
        """A 63-bit hash of the whole schedule, equal on ranks that would draw alike."""
        text = json.dumps(asdict(self), sort_keys=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def window_class(windows: tuple[int, ...]) -> str:
    """The name under which steps of comparable loss and duration are put together.

    The window itself; where the layers differ, their mean rounded to a factor of sqrt(2) (a class a combination would
    hardly ever be seen twice).
    """
    if len(set(windows)) == 1:
        return str(windows[0])
    return f"~{2 ** (round(2 * math.log2(sum(windows) / len(windows))) / 2):.0f}"


def check_agreement(windows: tuple[int, ...], fingerprint: int, step: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Stop the run when ranks disagree on this step's windows or on the schedule (a collective over ``group``).

    Raises RunError on every rank, naming both sides.
    """
    code = int.from_bytes(hashlib.blake2b(repr(windows).encode(), digest_size=8).digest(), "little") >> 1
    mine = torch.tensor([min(windows), code, fingerprint], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    views = [tuple(view.tolist()) for view in everyone]
    if len(set(views)) > 1:
        different = [f"rank {rank}: smallest window {view[0]}, schedule {view[2]:016x}" for rank, view in enumerate(views)]
        raise RunError(
            f"step {step}: ranks disagree on the attention window; every rank must run the same window configuration and seed. "
            + "; ".join(different[:8])
        )
