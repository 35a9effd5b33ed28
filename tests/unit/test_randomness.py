"""Golden values of the random functions: a change here changes the windows, the data order and the weights of every run."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from swax_megatron.randomness import Permutation, choice, integer, normal, uniform


def test_golden_draws() -> None:
    assert integer("window", 1, 0) == 9360282703897175615
    assert integer("window", 1, 1) == 4041496753784279242
    assert integer("window", 2, 0) == 13306572005311938700
    assert integer("data", 1, 0) == 3485208038524426497
    assert uniform("window", 1, 0) == 0.5074219421321904
    assert uniform("window", 1, 7) == 0.955940735397779
    draws = [choice([0.5, 0.5], "window", 1, step) for step in range(24)]
    assert draws == [1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 1]


def test_a_draw_is_the_hash_of_its_name() -> None:
    digest = hashlib.blake2b(b"window|3|5", digest_size=8).digest()
    assert integer("window", 3, 5) == int.from_bytes(digest, "little")


def test_golden_permutations() -> None:
    assert Permutation(10, "data", 1)(np.arange(10)).tolist() == [4, 8, 3, 7, 0, 5, 1, 6, 2, 9]
    assert Permutation(1000, "data", 3, 2, 1)(np.arange(5)).tolist() == [17, 338, 982, 102, 639]
    large = np.array([0, 1, 10**12 - 1])
    assert Permutation(10**12, "data", 3)(large).tolist() == [4800433966, 344639278559, 44110901252]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 255, 1000, 4097])
def test_permutations_are_bijections(n: int) -> None:
    permutation = Permutation(n, "data", 7, n)
    images = permutation(np.arange(n))
    assert sorted(images.tolist()) == list(range(n))
    assert permutation(n - 1) == images[-1]


def test_permutations_refuse_what_is_outside() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, "data", 1)(index)
    with pytest.raises(ValueError, match="n >= 1"):
        Permutation(0, "data", 1)


def test_permutations_of_other_seeds_differ() -> None:
    first, second = (Permutation(1000, "data", seed)(np.arange(1000)) for seed in (1, 2))
    assert (first == second).sum() < 10


def test_golden_normals() -> None:
    expected = [0.4198902, 1.1827165, 1.0517662, 0.3261622, -0.6508476, 0.4261223]
    np.testing.assert_allclose(normal(0, 6, "w", 1), expected, rtol=1e-6)
    np.testing.assert_allclose(normal(10**9, 10**9 + 3, "w", 1), [-0.3854385, 0.028236466, 0.64389235], rtol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (3, 3), (5, 40), (8, 9), (17, 64)])
def test_a_slice_of_normals_needs_nothing_before_it(start: int, stop: int) -> None:
    np.testing.assert_array_equal(normal(start, stop, "w", 1), normal(0, 64, "w", 1)[start:stop])


def test_normals_are_standard() -> None:
    sample = normal(0, 200_000, "w", 5).astype(np.float64)
    assert abs(sample.mean()) < 0.01 and abs(sample.std() - 1) < 0.01
    assert abs((sample**4).mean() - 3) < 0.1
    assert abs((sample[:-1] * sample[1:]).mean()) < 0.01


def test_choices_follow_their_probabilities_and_never_the_impossible() -> None:
    draws = [choice([0.75, 0.0, 0.25], "window", 1, step) for step in range(4000)]
    assert draws.count(1) == 0
    assert abs(draws.count(0) / 4000 - 0.75) < 0.03


def test_window_and_data_draws_are_independent() -> None:
    """Chi-squared of the joint counts of two purposes at the same seed and counter (3 x 3 cells, 4 degrees of freedom)."""
    counts = np.zeros((3, 3))
    for step in range(9000):
        counts[choice([1, 1, 1], "window", 1, step), choice([1, 1, 1], "data source", 1, step)] += 1
    expected = counts.sum(0) * counts.sum(1)[:, None] / counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # p = 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, *(2**k + d for k in (4, 7, 10, 12, 13) for d in (-1, 0, 1))])
def test_an_array_has_the_images_of_its_elements(n: int) -> None:
    """Large arrays are computed with tables, small ones and single indices without."""
    permutation = Permutation(n, "data", 5, n)
    indices = np.arange(n)
    whole = permutation(indices)
    assert whole.dtype == np.int64
    assert whole.tolist() == [permutation(index) for index in indices.tolist()]
    shuffled = np.random.default_rng(n).integers(0, n, (2, n))
    assert (permutation(shuffled) == whole[shuffled]).all()
    assert permutation(np.empty(0, np.int64)).tolist() == []
