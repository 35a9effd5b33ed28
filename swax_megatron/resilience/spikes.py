"""Loss spikes, by window class: a short window's loss is higher than a long one's, and neither may look like a spike of the other.

The score of a step is its loss's distance from the median of the last accepted losses with the same window, in robust
standard deviations (1.4826 x median absolute deviation). All of it is a function of ``GuardState``, which travels in the
checkpoint: a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

MAD_TO_SIGMA = 1.4826  # of a normal distribution
FLOOR = 0.005  # of the median: what counts at least as one standard deviation
FLOOR_NATS = 0.02  # and in nats: near zero a loss is skewed, and losses far above its median are no harm


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers.

    losses: accepted losses by window class, the newest last
    skipped: steps (below the run's) whose update was left out
    spent: skips in all, those of steps undone by a rewind included
    rewinds: {"step": where it was decided, "to": the checkpoint, "first_sample", "end_sample": data jumped over}
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    spent: int = 0
    rewinds: tuple[dict[str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any] | None) -> GuardState:
        """What ``to_json`` gave; an older checkpoint has none."""
        saved = saved or {}
        return cls(saved.get("losses", {}), tuple(saved.get("skipped", ())), saved.get("spent", 0), tuple(saved.get("rewinds", ())))

    def score(self, window: str, loss: float, minimum: int) -> float:
        """Robust standard deviations above the median of the class; 0 while fewer than ``minimum`` losses are known."""
        known = self.losses.get(window, [])
        if len(known) < max(2, minimum):
            return 0.0
        middle = median(known)
        sigma = MAD_TO_SIGMA * median([abs(loss - middle) for loss in known])
        return (loss - middle) / max(sigma, FLOOR * abs(middle), FLOOR_NATS)

    def accepted(self, window: str, loss: float, length: int) -> GuardState:
        """After an update that was applied; the last ``length`` losses are kept."""
        return replace(self, losses={**self.losses, window: [*self.losses.get(window, []), loss][-length:]})

    def refused(self, step: int) -> GuardState:
        """After an update that was left out."""
        return replace(self, skipped=(*self.skipped, step), spent=self.spent + 1)

    def streak(self, step: int) -> int:
        """How many steps up to and including ``step`` were skipped without a break."""
        length = 0
        while length < len(self.skipped) and self.skipped[-1 - length] == step - length:
            length += 1
        return length

    def rewound(self, now: GuardState, rewind: dict[str, int]) -> GuardState:
        """This state, of the checkpoint gone back to, with what ``now`` has spent."""
        return replace(self, spent=now.spent, rewinds=(*now.rewinds, rewind))
