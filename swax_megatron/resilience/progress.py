"""Where the training thread of this rank stands, and how long its sections take: written by it, read by the watchdog's."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

OVER = "over"  # section after training, finished or failed: nothing is watched any more
TIMED = ("data", "compute", "update", "agreement", "validation", "checkpoint")  # sections that do the same work each time
KEPT = 64  # durations of a class of section


@dataclass(frozen=True)
class Mark:
    """A section that was entered. kind: section and window class: durations of one kind are comparable."""

    section: str
    kind: tuple[str, str]
    step: int
    since: float  # time.monotonic()
    order: int  # sections entered so far


class Progress:
    """The training thread calls ``enter``; anyone may read ``mark``."""

    def __init__(self) -> None:
        self.mark = Mark("start", ("start", ""), -1, time.monotonic(), 0)
        self.seconds: dict[str, float] = defaultdict(float)  # of finished sections, by name, over this process
        self._durations: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))

    def enter(self, section: str, step: int, window: str = "") -> None:
        """End the current section and begin the next."""
        now, old = time.monotonic(), self.mark
        self.seconds[old.section] += now - old.since
        self._durations[old.kind].append(now - old.since)
        self.mark = Mark(section, (section, window), step, now, old.order + 1)

    def limit(self, mark: Mark, factor: float, minimum: float, unknown: float, ceiling: float = float("inf")) -> float:
        """Seconds after which a section is taken for hung: ``factor`` x the median of its kind, at least ``minimum``.

        unknown: for a kind with fewer than three durations (start, first steps with a window, first validation), and for
            sections that do nothing most of the time (callbacks), whose usual tells nothing
        ceiling: never more than this
        """
        known = list(self._durations.get(mark.kind, ()))
        usual = factor * median(known) if len(known) >= 3 and mark.section in TIMED else unknown
        return min(ceiling, max(minimum, usual))
