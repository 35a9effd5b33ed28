"""Filling a context: the largest amount of distracting text whose prompt still fits a length."""

from __future__ import annotations

from collections.abc import Callable

Build = Callable[[int], tuple[str, list[str]]]  # amount of text -> (prompt, references)
Count = Callable[[str], int]  # text -> tokens


def largest_fit(build: Build, count: Count, budget: int, step: int, upper: int) -> int:
    """The largest amount in [step, max(upper, 2 step)] whose prompt has at most ``budget`` tokens; ``step`` where none has.

    A binary search in RULER's order of calls, because each call draws random numbers.
    """
    low, high, best = step, max(upper, 2 * step), None
    while low <= high:
        middle = (low + high) // 2
        if count(build(middle)[0]) <= budget:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return step if best is None else best


def fitting_sample(build: Build, count: Count, budget: int, amount: int, step: int, name: str) -> tuple[str, list[str], int]:
    """A prompt of at most ``budget`` tokens, its references and its tokens; every failed try takes ``step`` from the amount.

    Raises ValueError when even the smallest amount is too long.
    """
    while True:
        prompt, references = build(amount)
        tokens = count(prompt)
        if tokens <= budget:
            return prompt, references, tokens
        if amount <= step:
            raise ValueError(
                f"{name}: its smallest prompt has {tokens} tokens and only {budget} fit beside the answer; use longer --lengths"
            )
        amount -= step
