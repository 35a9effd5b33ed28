"""NVIDIA's scoring: which references occur in the answer, ignoring case."""

from __future__ import annotations

import re
from collections.abc import Sequence

from swax_megatron.eval.ruler.tasks import Family

_CONTROL = re.compile(r"[\x00-\x1f]")


def score(family: Family, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean share of references found in an answer (questions: whether any is), in percent, rounded to two digits."""
    found = [_found(family, answer, wanted) for answer, wanted in zip(answers, references, strict=True)]
    return round(sum(found) / len(found) * 100, 2)


def _found(family: Family, answer: str, references: Sequence[str]) -> float:
    text = _CONTROL.sub("\n", answer.strip()).strip().lower()
    hits = [float(reference.lower() in text) for reference in references]
    return max(hits) if family.any_answer else sum(hits) / len(hits)
