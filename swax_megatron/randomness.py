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
        self._half = np.uint64(half)
        self._low = np.uint64((1 << half) - 1)
        self._keys = [np.uint64(integer(purpose, seed, *counters, r)) for r in range(_ROUNDS)]

    def _walk(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._low)
        return (left << self._half) | right

    def __call__(self, index: int | np.ndarray) -> int | np.ndarray:
        """The image of ``index`` (an int, or an integer array of any shape)."""
        x = np.asarray(index)
        if x.size and (int(x.min()) < 0 or int(x.max()) >= self.n):
            raise IndexError(f"index outside range({self.n})")
        with np.errstate(over="ignore"):
            y = self._walk(np.atleast_1d(x).astype(np.uint64))
            outside = y >= self.n
            while outside.any():
                y[outside] = self._walk(y[outside])
                outside = y >= self.n
        y = y.astype(np.int64)
        return int(y[0]) if x.ndim == 0 else y.reshape(x.shape)


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
