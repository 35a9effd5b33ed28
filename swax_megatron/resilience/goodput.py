"""Where the time of a run went, over all its restarts, from ``events.jsonl``.

An attempt tells its seconds by section in ``progress`` events, each what came since the last one, with the step that was
reached; one is written right before every save and every rewind. Steps that a later attempt (or a rewind) did again are
lost. What lies between the last sign of an attempt and the first step of the next is restart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PRODUCTIVE, DATA, CHECKPOINT, VALIDATION = "productive", "data wait", "checkpoint", "validation"
RESTART, LOST, OTHER = "restart", "lost", "other"
KINDS = (PRODUCTIVE, DATA, CHECKPOINT, VALIDATION, RESTART, LOST, OTHER)
SECTIONS = {"compute": PRODUCTIVE, "update": PRODUCTIVE, "data": DATA, "checkpoint": CHECKPOINT, "validation": VALIDATION}


@dataclass
class Attempt:
    """One start of the run. Times in seconds since the epoch; code: None where it was killed without a word."""

    number: int
    began: float
    last: float
    first_step: int | None = None
    resumed: float | None = None
    last_step: int | None = None
    code: int | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))


@dataclass
class Account:
    """A run's wall-clock time by kind, and its attempts."""

    seconds: dict[str, float]
    attempts: list[Attempt]

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last sign of life."""
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """Goodput: the productive share of the wall-clock time; 0 before anything was done."""
        return self.seconds[PRODUCTIVE] / self.wall if self.wall else 0.0


@dataclass
class _Piece:
    step: int
    attempt: Attempt
    seconds: dict[str, float]


def account(events: Iterable[dict[str, Any]]) -> Account:
    """Read the events of a run, oldest first."""
    attempts: dict[int, Attempt] = {}
    pieces: list[_Piece] = []
    for event in events:
        number, now = int(event.get("attempt", 1)), float(event["time"])
        if number not in attempts:
            attempts[number] = Attempt(number, float(event.get("began", now)), now)
        attempt = attempts[number]
        attempt.last = max(attempt.last, now)
        match event["event"]:
            case "resume":
                attempt.first_step, attempt.resumed = int(event["step"]), now
                _lose(pieces, attempt.first_step)
            case "rewind":
                _lose(pieces, int(event["to"]))
            case "progress":
                attempt.last_step = int(event["step"])
                pieces.append(_Piece(attempt.last_step, attempt, by_kind(event["seconds"])))
            case "end":
                attempt.code = int(event["code"])
    for piece in pieces:
        for kind, seconds in piece.seconds.items():
            piece.attempt.seconds[kind] += seconds
    ordered = [attempts[number] for number in sorted(attempts)]
    _restarts(ordered)
    return Account({kind: sum(each.seconds[kind] for each in ordered) for kind in KINDS}, ordered)


def by_kind(sections: dict[str, float]) -> dict[str, float]:
    """Seconds by section of the training loop -> seconds by kind."""
    kinds: dict[str, float] = {}
    for section, seconds in sections.items():
        kind = section if section in KINDS else SECTIONS.get(section, OTHER)
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    return kinds


def _lose(pieces: list[_Piece], step: int) -> None:
    """What was done beyond ``step`` will be done again."""
    for piece in pieces:
        if piece.step > step:
            gone = sum(piece.seconds.pop(kind, 0.0) for kind in (PRODUCTIVE, DATA, VALIDATION))
            piece.seconds[LOST] = piece.seconds.get(LOST, 0.0) + gone


def _restarts(attempts: list[Attempt]) -> None:
    """Fill in restart (from the last sign before to the first step) and other (the rest of the attempt's time)."""
    end = attempts[0].began if attempts else 0.0
    for attempt in attempts:
        ready = attempt.resumed if attempt.resumed is not None else attempt.last
        attempt.seconds[RESTART] = max(0.0, ready - end)
        known = sum(attempt.seconds.values())
        attempt.seconds[OTHER] += max(0.0, attempt.last - end - known)
        end = max(end, attempt.last)
