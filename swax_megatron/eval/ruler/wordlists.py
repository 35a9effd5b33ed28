"""English words: the lists of the ``wonderwords`` package, as RULER uses them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from importlib import resources
from itertools import accumulate


def word_list(kind: str) -> list[str]:
    """Words of one kind ("noun", "adjective", "verb"), in the package's order.

    Raises ValueError where the package is missing.
    """
    try:
        folder = resources.files("wonderwords") / "assets"
    except ModuleNotFoundError as error:
        raise ValueError("RULER's word tasks need the package wonderwords: pip install 'swax_megatron[eval]'") from error
    lines = (folder / f"{kind}list.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


class CompoundWords(Sequence[str]):
    """Every "adjective-noun" once, in sorted order, without holding the six million strings.

    Compounds of one adjective stand together, unless the adjective is itself the start of another ("wide", "wide-eyed"):
    such adjectives form one block, which is sorted as a whole when it is asked for.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._blocks: list[list[str]] = []
        for adjective in sorted(set(adjectives), key=lambda word: word + "-"):
            if self._blocks and adjective.startswith(self._blocks[-1][0] + "-"):
                self._blocks[-1].append(adjective)
            else:
                self._blocks.append([adjective])
        self._cache: dict[int, list[str]] = {}
        sizes = [len(self._nouns) if len(block) == 1 else len(self._compounds(number)) for number, block in enumerate(self._blocks)]
        self._ends = list(accumulate(sizes))

    def _compounds(self, number: int) -> list[str]:
        if number not in self._cache:
            self._cache[number] = sorted({f"{adjective}-{noun}" for adjective in self._blocks[number] for noun in self._nouns})
        return self._cache[number]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = bisect_right(self._ends, index)
        offset = index - (self._ends[block - 1] if block else 0)
        if len(self._blocks[block]) == 1:
            return f"{self._blocks[block][0]}-{self._nouns[offset]}"
        return self._compounds(block)[offset]
