"""Where a run stands, and what one step of it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from swax_megatron.data.mixture import StreamState


@dataclass
class TrainState:
    """Where a run stands: ``step`` updates are done, ``data`` says which sequences come next."""

    step: int
    tokens_seen: int
    data: StreamState


@dataclass
class StepResult:
    """What one update did. ``metrics`` holds its scalars by TensorBoard name; callbacks add to it."""

    step: int
    windows: tuple[int, ...]  # of every layer
    attention_windows: tuple[int, ...]  # of the S layers: steps with equal ones are comparable in loss and time
    seconds: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
