"""Randomness as pure functions: no generator state, nothing to checkpoint, the same on every rank and version.

* ``uniform`` / ``integer``: one draw from a purpose, a seed and counters (blake2b).
* ``Permutation``: a bijection of range(n) with random access (Feistel network with cycle walking).
* ``normal``: standard normals addressed by their global element index (Philox counter + Box-Muller).

The purpose separates domains: the window's draws and the data's never share a stream. Golden values are in
``tests/unit/test_randomness.py``; changing a value here changes every run made so far.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def integer(purpose: str, seed: int, *counters: int) -> int:
    """A uniform 64-bit integer that depends on (purpose, seed, counters) alone."""
    text = "|".join([purpose, str(int(seed)), *(str(int(c)) for c in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(purpose: str, seed: int, *counters: int) -> float:
    """A uniform float in [0, 1) with 53 random bits."""
    return (integer(purpose, seed, *counters) >> 11) * 2.0**-53


def choice(probabilities: list[float] | tuple[float, ...], purpose: str, seed: int, *counters: int) -> int:
    """An index drawn with the given probabilities (they need not be normalised)."""
    threshold = uniform(purpose, seed, *counters) * math.fsum(probabilities)
    cumulative = 0.0
    for index, probability in enumerate(probabilities):
        cumulative += probability
        if threshold < cumulative:
            return index
    return max(i for i, p in enumerate(probabilities) if p > 0)  # rounding at the very end of the interval


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser with full avalanche (the constants of splitmix64; Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of range(n), evaluated at any index in O(1) without a table.

    A balanced Feistel network over the smallest even number of bits that holds n; values that fall outside
    range(n) are walked on until they return (Black and Rogaway 2002).
    """

    def __init__(self, n: int, purpose: str, seed: int, *counters: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, got {n}")
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._low = half, (1 << half) - 1
        self._keys = [np.uint64(integer(purpose, seed, *counters, r)) for r in range(_ROUNDS)]

    def _walk(self, x: np.ndarray) -> np.ndarray:
        half, low = np.uint64(self._half), np.uint64(self._low)
        left, right = x >> half, x & low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return (left << half) | right

    def _tables(self) -> list[np.ndarray]:
        """The round function of every round at every right half: (2^half,) each."""
        right = np.arange(self._low + 1, dtype=np.uint64)
        return [(_mix(right ^ key) & np.uint64(self._low)).astype(np.intp) for key in self._keys]

    def _walk_tables(self, x: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
        left, right, spare = x >> self._half, x & self._low, np.empty_like(x)
        for table in tables:
            np.take(table, right, out=spare, mode="clip")  # in range anyhow; "clip" writes to out without a buffer
            spare ^= left
            left, right, spare = right, spare, left
        left <<= self._half
        left |= right
        return left

    def __call__(self, index: int | np.ndarray) -> int | np.ndarray:
        """The image of ``index`` (an int, or an integer array of any shape)."""
        x = np.asarray(index)
        if x.size and (int(x.min()) < 0 or int(x.max()) >= self.n):
            raise IndexError(f"index outside range({self.n})")
        with np.errstate(over="ignore"):
            if x.ndim and 2 * x.size > self._low:  # many values share a round function's few arguments
                tables = self._tables()
                y = self._inside(x.astype(np.intp).ravel(), lambda some: self._walk_tables(some, tables))
            else:
                y = self._inside(x.astype(np.uint64).ravel(), self._walk)
        return int(y[0]) if x.ndim == 0 else y.astype(np.int64, copy=False).reshape(x.shape)

    def _inside(self, x: np.ndarray, walk: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Walk every value until it lies in range(n)."""
        y = walk(x)
        outside = np.flatnonzero(y >= self.n)
        while outside.size:
            y[outside] = again = walk(y[outside])
            outside = outside[again >= self.n]
        return y


def normal(start: int, stop: int, purpose: str, seed: int) -> np.ndarray:
    """Elements [start, stop) of an endless float32 sequence of standard normals.

    Element i depends on (purpose, seed, i) alone, so that any slice of a tensor can be drawn without the rest.
    Each 64-bit word of the Philox stream gives two normals (Box-Muller on its two 32-bit halves).
    """
    first_word, last_word = start // 2, (stop + 1) // 2
    key = integer(purpose, seed) | (integer(purpose, seed, 1) << 64)
    stream = np.random.Philox(key=key)
    stream.advance(first_word // 4)  # one Philox counter gives four words
    words = stream.random_raw(last_word - first_word // 4 * 4)[first_word % 4 :] if stop > start else np.empty(0, "u8")
    u = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    v = ((words & np.uint64(0xFFFFFFFF)).astype(np.float64)) * 2.0**-32
    radius, angle = np.sqrt(-2.0 * np.log(u)), (2.0 * np.pi) * v
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32).reshape(-1)
    return pairs[start - 2 * first_word : stop - 2 * first_word]
