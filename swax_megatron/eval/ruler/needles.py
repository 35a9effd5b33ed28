"""Needles in a haystack: "One of the special magic numbers for KEY is: VALUE." hidden in noise, in other needles or in essays."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from random import Random

from swax_megatron.eval.ruler.tasks import Task

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(place * 100 / 39) for place in range(40)]  # percent of the text
ESSAY_STEP, LINE_STEP, SHORT_STEP, SHORT = 500, 25, 5, 4096


class Needles:
    """Builds prompts of one needle task. essay: the words of the essays; split: text -> sentences."""

    def __init__(
        self, task: Task, seed: int, length: int, compounds: Sequence[str], essay: Sequence[str], split: Callable[[str], list[str]]
    ) -> None:
        self.options, self.family, self.seed = task.options, task.family, seed
        self.random = Random(seed)
        self.compounds, self.essay, self.split = compounds, essay, split
        self.keys = max(int(self.options["num_keys"]), int(self.options["num_queries"]))
        in_essay = self.options["haystack"] == "essay"
        self.step = ESSAY_STEP if in_essay else SHORT_STEP if length < SHORT else LINE_STEP

    def build(self, amount: int) -> tuple[str, list[str]]:
        """A prompt with ``amount`` words (essay) or lines of haystack, and its references."""
        options, kind = self.options, str(self.options["values"])
        keys, values, needles = [], [], []
        for _ in range(self.keys):
            keys.append(self._draw(str(options["keys"])))
            values.append([])
            for _ in range(int(options["num_values"])):
                values[-1].append(self._draw(kind))
                needles.append(SENTENCE.format(kind=kind, key=keys[-1], value=values[-1][-1]))
        Random(self.seed).shuffle(needles)
        context = self._in_essay(needles, amount) if options["haystack"] == "essay" else self._in_lines(needles, amount)

        asked = self.random.sample(range(self.keys), int(options["num_queries"]))
        names = [keys[index] for index in asked]
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
        template = self.family.template
        if len(asked) * int(options["num_values"]) == 1:  # the singular, word by word as the benchmark does
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = kind.removesuffix("s")
        references = [value for index in asked for value in values[index]]
        return template.format(type_needle_v=kind, context=context, query=query), references

    def _draw(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.random.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.random.choice(self.compounds)
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def _in_essay(self, needles: list[str], words: int) -> str:
        repeats = -(-words // len(self.essay))
        sentences = self.split(" ".join((list(self.essay) * repeats)[:words]).strip())
        cuts = sorted(int(len(sentences) * (depth / 100)) for depth in self.random.sample(DEPTHS, len(needles)))
        parts, start = [], 0
        for cut, needle in zip(cuts, needles, strict=True):
            parts += [" ".join(sentences[start:cut]), needle]
            start = cut
        return " ".join([*parts, " ".join(sentences[start:])])

    def _in_lines(self, needles: list[str], count: int) -> str:
        if self.options["haystack"] == "noise":
            lines = [NOISE] * count
        else:
            kinds = str(self.options["keys"]), str(self.options["values"])
            lines = [SENTENCE.format(kind=kinds[1], key=self._draw(kinds[0]), value=self._draw(kinds[1])) for _ in range(count)]
        places = sorted(self.random.sample(range(count), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)
