"""Boxes against brute force on small arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swax_megatron.checkpoint.boxes import Box, find_overlap, flat_range_boxes, intersect, subtract, tiling_error

SMALL = st.integers(1, 7)


@st.composite
def shape_and_box(draw, dims=None):
    shape = draw(st.lists(SMALL, min_size=dims or 1, max_size=dims or 3))
    return tuple(shape), draw(box_in(shape))


def box_in(shape):
    def build(pairs):
        low = tuple(min(p) for p in pairs)
        return Box(low, tuple(max(p) - o + 1 for p, o in zip(pairs, low, strict=True)))

    return st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)) for n in shape)).map(build)


def mask(shape, boxes):
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        count[box.slices()] += 1
    return count


@settings(max_examples=80, deadline=None)
@given(st.lists(SMALL, min_size=1, max_size=2), st.data())
def test_flat_range(shape, data):
    total = int(np.prod(shape))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    boxes = flat_range_boxes(shape, start, stop)
    assert len(boxes) <= 3
    flat = np.arange(total)
    whole = flat.reshape(shape)
    pieces = []
    for box in boxes:
        assert np.array_equal(whole[box.slices()], flat[box.flat_start : box.flat_start + box.volume].reshape(box.sizes))
        pieces.append(whole[box.slices()].reshape(-1))
    assert np.array_equal(np.concatenate([np.empty(0, int), *pieces]), flat[start:stop])  # in order, each once


def test_flat_range_examples():
    assert flat_range_boxes((5, 4), 2, 15) == [Box((0, 2), (1, 2), 2), Box((1, 0), (2, 4), 4), Box((3, 0), (1, 3), 12)]
    assert flat_range_boxes((5, 4), 5, 7) == [Box((1, 1), (1, 2), 5)]
    assert flat_range_boxes((5, 4), 7, 7) == []
    assert flat_range_boxes((9,), 2, 5) == [Box((2,), (3,), 2)]
    for shape, start, stop in (((2, 2, 2), 0, 1), ((4,), 0, 5), ((4,), 3, 2), ((4,), -1, 2)):
        with pytest.raises(ValueError, match="flat range"):
            flat_range_boxes(shape, start, stop)


@settings(max_examples=80, deadline=None)
@given(shape_and_box(), st.data())
def test_intersect_subtract(shape_box, data):
    shape, a = shape_box
    b = data.draw(box_in(shape))
    common = intersect(a, b)
    ma, mb = mask(shape, [a]), mask(shape, [b])
    assert np.array_equal(mask(shape, [common] if common else []), ma * mb)
    assert np.array_equal(mask(shape, subtract(a, b)), ma * (1 - mb))
    origin = a.offsets
    if common:
        assert np.arange(ma.size).reshape(shape)[a.slices()][common.slices(origin)].size == common.volume


@settings(max_examples=80, deadline=None)
@given(shape_and_box(dims=2), st.data())
def test_tiling_is_exact(shape_box, data):
    shape, _ = shape_box
    # Cut recursively into a true tiling, then perhaps spoil it.
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 4))):
        piece = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        inner = data.draw(box_in(piece.sizes)).shifted(piece.offsets)
        boxes += [inner, *subtract(piece, inner)]
    assert tiling_error(shape, boxes) is None
    drop = data.draw(st.integers(0, len(boxes) - 1))
    extra = data.draw(box_in(shape))
    spoilt = [box for i, box in enumerate(boxes) if i != drop]
    assert "no chunk holds" in tiling_error(shape, spoilt)
    assert "overlap" in tiling_error(shape, [*boxes, extra])
    swapped = [*spoilt, extra]  # may by chance have the right volume and even be right
    assert (tiling_error(shape, swapped) is None) == bool((mask(shape, swapped) == 1).all())
    assert (find_overlap(swapped) is None) == bool((mask(shape, swapped) <= 1).all())


def test_tiling_edges():
    assert tiling_error((), [Box((), ())]) is None
    assert "overlap" in tiling_error((), [Box((), ()), Box((), ())])
    assert "no chunk" in tiling_error((), [])
    assert tiling_error((0, 3), []) is None
    assert "outside" in tiling_error((4,), [Box((2,), (3,))])
    assert "outside" in tiling_error((4,), [Box((-1,), (5,))])
    assert "dimensions" in tiling_error((4,), [Box((0, 0), (4, 1))])


def test_many_chunks():
    shape = (512, 512)
    boxes = [Box((i, j), (8, 16)) for i in range(0, 512, 8) for j in range(0, 512, 16)]
    assert tiling_error(shape, boxes) is None
    assert "[504:512, 496:512]" in tiling_error(shape, boxes[:-1])
