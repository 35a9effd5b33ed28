"""Which documents are kept: by the length of their text and by regular expressions."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Filter:
    """Bounds on the bytes of UTF-8 text, expressions of which one must match somewhere, and expressions of which none may."""

    min_text_bytes: int = 1
    max_text_bytes: int | None = None
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def compiled(self) -> CompiledFilter:
        """Ready for use; ValueError where an expression is none."""
        return CompiledFilter(self)


class CompiledFilter:
    """``filter(text)`` gives the reason for which a document is left out, or None."""

    def __init__(self, rules: Filter) -> None:
        self._rules = rules
        self._keep, self._drop = ([_compiled(text) for text in texts] for texts in (rules.keep, rules.drop))

    def __call__(self, text: bytes) -> str | None:
        """"empty", "too_short", "too_long" or "filtered"; None for a document that stays."""
        if not text:
            return "empty"
        if len(text) < self._rules.min_text_bytes:
            return "too_short"
        if self._rules.max_text_bytes is not None and len(text) > self._rules.max_text_bytes:
            return "too_long"
        if self._keep or self._drop:
            decoded = text.decode("utf-8")
            if self._keep and not any(pattern.search(decoded) for pattern in self._keep):
                return "filtered"
            if any(pattern.search(decoded) for pattern in self._drop):
                return "filtered"
        return None


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from error
