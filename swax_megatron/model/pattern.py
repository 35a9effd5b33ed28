"""The layer pattern: a string such as "(MS)x12" -> one kind a layer."""

from __future__ import annotations

import re

KINDS = {"M": "mLSTM", "S": "sliding-window attention", "F": "full attention"}

_TOKEN = re.compile(r"\s*(?:([MSF])|(\()|\)\s*(?:[x×*]\s*(\d+))?|[x×*]\s*(\d+))")


def parse_pattern(pattern: str) -> str:
    """Expand a pattern: ``"M(MS)x3F"`` -> ``"MMSMSMSF"``.

    Grammar: letters M, S, F; ``(...)`` groups, which nest; a count ``xN`` after a letter or a group repeats it.
    Raises ValueError that names the place where the pattern stops making sense.
    """
    groups: list[list[str]] = [[]]
    position = 0
    text = pattern.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(
                f"model.pattern={pattern!r}: cannot read {text[position:].strip()[:8]!r}; use the letters "
                f"{', '.join(f'{k} ({v})' for k, v in KINDS.items())} and groups such as (MS)x12"
            )
        letter, opening, group_count, count = match.groups()
        if letter:
            groups[-1].append(letter)
        elif opening:
            groups.append([])
        elif count is not None:
            if not groups[-1]:
                raise ValueError(f"model.pattern={pattern!r}: the count x{count} follows nothing that could be repeated")
            groups[-1][-1] *= int(count)
        else:
            if len(groups) == 1:
                raise ValueError(f"model.pattern={pattern!r}: a ')' closes no group")
            body = "".join(groups.pop())
            groups[-1].append(body * int(group_count or 1))
        position = match.end()
    if len(groups) > 1:
        raise ValueError(f"model.pattern={pattern!r}: a '(' is never closed")
    layers = "".join(groups[0])
    if not layers:
        raise ValueError(f"model.pattern={pattern!r} has no layers; for example (MS)x12")
    return layers
