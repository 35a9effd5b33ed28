"""Where a run stands, and what one step of it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from swax_megatron.data.mixture import StreamState
from swax_megatron.resilience.spikes import GuardState


@dataclass
class TrainState:
    """Where a run stands: ``step`` updates are done, ``data`` says which sequences come next."""

    step: int
    tokens_seen: int
    data: StreamState
    guard: GuardState = field(default_factory=GuardState)

    @property
    def updates(self) -> int:
        """Updates that AdamW has really done: steps less the skipped ones."""
        return self.step - len(self.guard.skipped)


@dataclass(frozen=True)
class Proposal:
    """A step's reduced gradient, before the weights move."""

    step: int
    attention_windows: tuple[int, ...]
    loss: float
    grad_norm: float


@dataclass
class StepResult:
    """What one update did. ``metrics`` and ``histograms`` hold its values by TensorBoard name; callbacks add to them."""

    step: int
    windows: tuple[int, ...]  # of every layer
    attention_windows: tuple[int, ...]  # of the S layers: steps with equal ones are comparable in loss and time
    seconds: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    data_wait: float = 0.0  # this rank's seconds until it had its rows
    busy: float = 0.0  # this rank's seconds in forward passes
    histograms: dict[str, list[float]] = field(default_factory=dict)
