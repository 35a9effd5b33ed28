"""Variable tracking: chains of assignments scattered through noise, after one solved example."""

from __future__ import annotations

import string
from random import Random

import numpy as np

from swax_megatron.eval.ruler.needles import NOISE, SHORT
from swax_megatron.eval.ruler.tasks import Task

EXAMPLE_VALUE, EXAMPLE_TOKENS = "12345", 500


class Tracking:
    """Builds prompts of the variable-tracking task. ``make_example`` comes first, as its draws do."""

    def __init__(self, task: Task, seed: int, length: int) -> None:
        self.family, self.random, self.numbers = task.family, Random(seed), np.random.RandomState(seed)
        self.chains, self.hops = int(task.options["chains"]), int(task.options["hops"])
        self.step = 5 if length < SHORT else 10
        self.example = ""

    def build(self, lines: int, example: bool = False) -> tuple[str, list[str]]:
        """A prompt with ``lines`` lines of noise, and the variables that hold the value asked for."""
        names, chains = self._chains(example)
        value = chains[0][0].split("=")[-1].strip()
        text = [NOISE] * lines
        for chain in chains:
            places = sorted(self.random.sample(range(len(text)), len(chain)))
            for order, (place, assignment) in enumerate(zip(places, chain, strict=True)):
                text.insert(place + order, assignment)
        context = "\n".join(text).replace(". \n", ".\n")
        return self.family.template.format(context=context, query=value, num_v=self.hops + 1), names[0]

    def build_after_example(self, lines: int) -> tuple[str, list[str]]:
        """A prompt after the solved example, whose names and value are drawn anew each time."""
        prompt, names = self.build(lines)
        return f"{self._renamed_example()}\n{prompt}", names

    def keep_example(self, prompt: str, names: list[str]) -> str:
        """Remember a solved prompt; returns the text that goes before every other."""
        self.example = f"{prompt} {' '.join(names)}\n"
        return self.example

    def _chains(self, example: bool) -> tuple[list[list[str]], list[list[str]]]:
        length, size = (3 if example else 5), self.hops + 1
        names = ["".join(self.random.choices(string.ascii_uppercase, k=length)) for _ in range(size * self.chains)]
        while len(set(names)) < size * self.chains:
            names.append("".join(self.random.choices(string.ascii_uppercase, k=length)))
        groups, chains = [], []
        for start in range(0, len(names), size):
            group = names[start : start + size]
            value = EXAMPLE_VALUE if example else str(self.numbers.randint(10000, 99999))
            groups.append(group)
            chains.append([f"VAR {group[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(group, group[1:], strict=False))])
        return groups, chains

    def _renamed_example(self) -> str:
        text = self.example
        for name in text.strip().split()[-self.hops - 1 :]:
            text = text.replace(name, "".join(self.random.choices(string.ascii_uppercase, k=len(name))))
        return text.replace(EXAMPLE_VALUE, str(self.numbers.randint(10000, 99999)))
