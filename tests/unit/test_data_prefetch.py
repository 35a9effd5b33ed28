"""Reading ahead changes nothing but the time: order, errors, bounds."""

from __future__ import annotations

import threading
import time

import pytest

from swax_megatron.data.prefetch import Prefetcher


def plan(state: int, step: int) -> tuple[list[tuple[int, int]], int]:
    """Step s has s % 3 + 1 pieces; the state counts pieces."""
    size = step % 3 + 1
    return [(step, state + i) for i in range(size)], state + size


@pytest.mark.parametrize("workers, ahead", [(0, 2), (1, 0), (1, 1), (3, 4), (8, 100)])
def test_the_same_as_without(workers, ahead):
    def load(piece):
        time.sleep(0.002 * (piece[1] % 3))  # pieces end out of order
        return ("loaded", *piece)

    prefetcher = Prefetcher(plan, load, workers, ahead, end=12)
    state, taken = 0, []
    for step in range(12):
        pieces, state = prefetcher.take(state, step)
        taken += pieces
    prefetcher.close()
    expected, state = [], 0
    for step in range(12):
        pieces, state = plan(state, step)
        expected += [("loaded", *piece) for piece in pieces]
    assert taken == expected


def test_another_state_than_foreseen():
    """After a resume, or data that was skipped, what was loaded ahead is dropped."""
    prefetcher = Prefetcher(plan, lambda piece: piece, 2, 3, end=100)
    assert prefetcher.take(0, 0) == ([(0, 0)], 1)
    assert prefetcher.take(50, 1) == ([(1, 50), (1, 51)], 52)
    assert prefetcher.take(52, 2)[0][0] == (2, 52)
    assert prefetcher.take(52, 2)[0][0] == (2, 52)  # the same step again
    prefetcher.close()


def test_memory_is_bounded():
    before = set(threading.enumerate())
    held, most, lock = set(), [0], threading.Lock()

    def load(piece):
        with lock:
            held.add(piece)
            most[0] = max(most[0], len({step for step, _ in held}))
        return piece

    prefetcher = Prefetcher(lambda state, step: ([(step, i) for i in range(4)], state), load, 4, 2, end=30)
    for step in range(30):
        time.sleep(0.003)  # the threads get as far ahead as they may
        for piece in prefetcher.take(0, step)[0]:
            with lock:
                held.discard(piece)
    prefetcher.close()
    assert most[0] == 3
    left = {thread for thread in threading.enumerate() if thread.name.startswith("data")}
    assert left <= before  # close() ended the threads of this one


def test_an_error_reaches_whoever_takes_that_step():
    def load(piece):
        if piece[0] == 3:
            raise OSError(f"piece {piece} is gone")
        return piece

    prefetcher = Prefetcher(plan, load, 2, 5, end=100)
    state = 0
    for step in range(3):
        _, state = prefetcher.take(state, step)
    for _ in range(2):  # again where it is tried again
        with pytest.raises(OSError, match=r"piece \(3, "):
            prefetcher.take(state, 3)
    prefetcher.close()


def test_nothing_is_loaded_beyond_the_end():
    loaded = []
    prefetcher = Prefetcher(plan, lambda piece: loaded.append(piece), 1, 10, end=2)
    _, state = prefetcher.take(0, 0)
    prefetcher.take(state, 1)
    prefetcher.close()
    assert {step for step, _ in loaded} == {0, 1}
