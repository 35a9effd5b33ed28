"""Aggregation: the ten words listed most often (cwe), the three coded words that occur most often (fwe)."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from swax_megatron.eval.ruler.needles import SHORT
from swax_megatron.eval.ruler.tasks import Task

ZETA_2 = math.pi**2 / 6  # the sum of k^-2: frequencies of the coded words


class CommonWords:
    """Builds prompts of the common-words task. words: in their drawing order; more: used where a list needs more words than that."""

    step = 10

    def __init__(self, task: Task, seed: int, length: int, words: Sequence[str], more: Sequence[str]) -> None:
        self.family, self.options, self.seed, self.random = task.family, task.options, seed, Random(seed)
        self.words, self.more, self.short = list(words), list(more), length < SHORT
        Random(seed).shuffle(self.words)

    def build(self, count: int) -> tuple[str, list[str]]:
        """A solved example, then a list of ``count`` different words, ten of which are repeated more often."""
        repeats = (int(self.options["common_repeats"]), int(self.options["uncommon_repeats"]))
        example, solution = self._list(20, 3, 1) if self.short else self._list(40, 10, 3)
        context, answer = self._list(count, 6, 1) if self.short else self._list(count, *repeats)
        solved = " ".join(f"{number}. {word}" for number, word in enumerate(solution, 1))
        template = self.family.template
        return f"{template.format(context=example)} {solved}\n{template.format(context=context)}", answer

    def _list(self, count: int, common_repeats: int, uncommon_repeats: int) -> tuple[str, list[str]]:
        pool = self.words if count <= len(self.words) else self.more
        if count > len(pool):
            raise ValueError(
                f"cwe: a list of {count:,} different words is needed at this length and there are {max(len(self.words), len(pool)):,}; "
                "give a longer list with --words FILE (one word a line) or a shorter length"
            )
        drawn = self.random.sample(pool, count)
        common, uncommon = drawn[: int(self.options["common"])], drawn[int(self.options["common"]) :]
        listed = common * common_repeats + uncommon * uncommon_repeats
        Random(self.seed).shuffle(listed)
        return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)), common


class FrequentWords:
    """Builds prompts of the coded-words task. budget: tokens of a prompt."""

    def __init__(self, task: Task, seed: int, budget: int, count: Callable[[str], int]) -> None:
        self.family, self.seed, self.random, self.count = task.family, seed, Random(seed), count
        self.budget, self.kinds, self.step = budget, budget // 50, budget // 32
        self.word_length = int(task.options["word_length"])

    def largest(self) -> int:
        """How many words fit."""
        vocabulary = self._vocabulary()
        words = self.budget // self.word_length
        while self.count(self._text(vocabulary, words)) < self.budget:
            words += self.step
        return words - self.step

    def build(self, words: int) -> tuple[str, list[str]]:
        """A prompt of about ``words`` coded words, of which the commonest is noise, and the three next ones."""
        vocabulary = self._vocabulary()
        text = self._text(vocabulary, words)
        while self.count(text) > self.budget:
            words -= self.step
            text = self._text(vocabulary, words)
        return text, vocabulary[1:4]

    def _vocabulary(self) -> list[str]:
        words = ["".join(self.random.choices(string.ascii_lowercase, k=self.word_length)) for _ in range(self.kinds)]
        while len(set(words)) < self.kinds:
            words.append("".join(self.random.choices(string.ascii_lowercase, k=self.word_length)))
        words = sorted(set(words))
        Random(self.seed).shuffle(words)
        return ["...", *words[1:]]

    def _text(self, vocabulary: list[str], words: int) -> str:
        ranks = np.arange(1, len(vocabulary) + 1)
        repeats = (words * ranks**-2.0 / ZETA_2).astype(int)
        listed = [word for word, count in zip(vocabulary, repeats, strict=True) for _ in range(count)]
        Random(self.seed).shuffle(listed)
        return self.family.template.format(context=" ".join(listed))
