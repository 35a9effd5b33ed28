"""Mixtures: the plan is a pure function of the state; every layout reads the same batches; a resume that is not exact is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swax_megatron.data.mixture import Mixture, StreamState
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.data.stream import SequenceStream
from tests.texts import random_documents, write_ids

NAMES = ["web", "code", "books"]


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[SequenceStream]:
    folder = tmp_path_factory.mktemp("mixture")
    sizes = (30, 60, 90)
    sets = [ShardedDataset(write_ids(folder / name, random_documents(n, seed=n))) for name, n in zip(NAMES, sizes, strict=True)]
    return [SequenceStream(dataset, 16, seed=1) for dataset in sets]


@pytest.fixture(scope="module")
def mixture(streams) -> Mixture:
    return Mixture(streams, [0.5, 0.3, 0.2], NAMES, seed=11)


def test_golden_sources(mixture):
    """Part of the format, like the order inside a source."""
    plan, state = mixture.plan(mixture.initial_state(), 12)
    assert plan == GOLDEN_PLAN
    assert state == StreamState(12, (10, 1, 1))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_a_resume_anywhere_continues_exactly(mixture, cuts):
    whole, end = mixture.plan(mixture.initial_state(), sum(cuts))
    parts, state = [], mixture.initial_state()
    for cut in cuts:
        part, state = mixture.plan(state, cut)
        parts += part
        state = mixture.state_from_json(json.loads(json.dumps(mixture.state_to_json(state))))
    assert (parts, state) == (whole, end)


def test_every_split_over_ranks_reads_the_same_batches(mixture):
    plan, _ = mixture.plan(StreamState(100, (50, 30, 20)), 24)
    whole = mixture.load(plan)
    assert whole.ids_bt1.shape == (24, 17) and whole.ids_bt1.dtype == np.uint16 and whole.mask_bt1.dtype == bool
    for ranks in (1, 2, 3, 8, 24):
        size = 24 // ranks
        parts = [mixture.load(plan[rank * size : (rank + 1) * size]) for rank in range(ranks)]
        assert (np.concatenate([part.ids_bt1 for part in parts]) == whole.ids_bt1).all()
        assert (np.concatenate([part.source_b for part in parts]) == whole.source_b).all()
    for row, (source, index) in enumerate(plan):
        assert (whole.ids_bt1[row] == mixture.streams[source][index][0]).all()


def test_sources_are_read_in_order_without_gaps(mixture):
    plan, state = mixture.plan(mixture.initial_state(), 3000)
    for source in range(3):
        assert [index for s, index in plan if s == source] == list(range(state.positions[source]))
    shares = np.array(state.positions) / 3000
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.03
    assert mixture.epochs(state)["web"] == state.positions[0] / mixture.streams[0].per_epoch > 1


def test_new_weights_act_on_later_samples_only(streams, mixture):
    _, state = mixture.plan(mixture.initial_state(), 100)
    changed = Mixture(streams, [0.0, 0.0, 1.0], NAMES, seed=11)
    resumed = changed.state_from_json(mixture.state_to_json(state))
    assert resumed == state
    plan, _ = changed.plan(resumed, 20)
    assert plan == [(2, state.positions[2] + i) for i in range(20)]


def test_the_order_of_sources_may_change_in_the_configuration(streams, mixture):
    _, state = mixture.plan(mixture.initial_state(), 100)
    turned = Mixture(streams[::-1], [0.2, 0.3, 0.5], NAMES[::-1], seed=11)
    assert turned.state_from_json(mixture.state_to_json(state)).positions == state.positions[::-1]


def test_a_resume_that_is_not_exact_is_refused(streams, mixture, tmp_path):
    saved = mixture.state_to_json(mixture.plan(mixture.initial_state(), 50)[1])
    weights = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="source 'wiki' is not among the checkpoint's"):
        Mixture([*streams, streams[0]], [1.0] * 4, [*NAMES, "wiki"], seed=11).state_from_json(saved)
    with pytest.raises(ValueError, match="the checkpoint's source 'books' is missing"):
        Mixture(streams[:2], weights[:2], NAMES[:2], seed=11).state_from_json(saved)
    with pytest.raises(ValueError, match="source 'novels' is not among"):
        Mixture(streams, weights, ["web", "code", "novels"], seed=11).state_from_json(saved)
    with pytest.raises(ValueError, match="seed=11, not 12"):
        Mixture(streams, weights, NAMES, seed=12).state_from_json(saved)
    longer = [SequenceStream(stream.dataset, 17, seed=1) for stream in streams]
    with pytest.raises(ValueError, match="sequence_length=16, not 17"):
        Mixture(longer, weights, NAMES, seed=11).state_from_json(saved)
    other = SequenceStream(ShardedDataset(write_ids(tmp_path / "web", random_documents(31))), 16, seed=1)
    with pytest.raises(ValueError, match="source 'web' at .* is not what the checkpoint read"):
        Mixture([other, *streams[1:]], weights, NAMES, seed=11).state_from_json(saved)


def test_a_curriculum_changes_the_weights_at_its_steps(streams):
    """Draws are those of a mixture that always had the weights of the step; each source goes on where it stood."""
    phases = [(0, [1.0, 0.0, 0.0]), (3, [0.0, 0.5, 0.5]), (7, [0.2, 0.0, 0.8])]
    curriculum = Mixture(streams, phases[0][1], NAMES, seed=11, curriculum=phases[1:])
    state, positions = curriculum.initial_state(), [0, 0, 0]
    for step in range(10):
        weights = next(weights for first, weights in reversed(phases) if step >= first)
        assert curriculum.weights_at(step) == weights
        constant = Mixture(streams, weights, NAMES, seed=11)
        expected, _ = constant.plan(state, 20)
        plan, after = curriculum.plan(state, 20, step)
        assert plan == expected
        for source, index in plan:
            assert weights[source] > 0 and index == positions[source]
            positions[source] += 1
        state = curriculum.state_from_json(json.loads(json.dumps(curriculum.state_to_json(after))))
    epochs = curriculum.epochs(state)
    assert epochs == {name: position / stream.per_epoch for name, position, stream in zip(NAMES, positions, streams, strict=True)}
    with pytest.raises(ValueError, match="2 weights, 3 sources"):
        Mixture(streams, [1.0, 1.0, 1.0], NAMES, seed=11, curriculum=[(3, [1.0, 1.0])])


def test_packing_and_shuffling_are_part_of_the_order(streams, mixture):
    saved = mixture.state_to_json(mixture.initial_state())
    for key, other in (("packing", "best_fit"), ("shuffle_tokens", 64)):
        changed = json.loads(json.dumps(saved))
        changed["sources"]["code"][key] = other
        with pytest.raises(ValueError, match=f"the checkpoint read 'code' with {key}={other!r}, not .*: set it back"):
            mixture.state_from_json(changed)
    older = json.loads(json.dumps(saved))
    for source in older["sources"].values():
        del source["packing"], source["shuffle_tokens"], source["skipped"]
    assert mixture.state_from_json(older) == mixture.initial_state()


@pytest.mark.parametrize(
    "weights, names, sentence",
    [
        ([1.0, 1.0], NAMES, "a weight and a name for each source"),
        ([1.0, -1.0, 1.0], NAMES, "weight of source 'code' is -1.0"),
        ([1.0, float("nan"), 1.0], NAMES, "weight of source 'code' is nan"),
        ([0.0, 0.0, 0.0], NAMES, "are 0"),
        ([1.0, 1.0, 1.0], ["a", "b", "a"], "two sources are named 'a'"),
    ],
)
def test_bad_mixtures(weights, names, sentence, streams):
    with pytest.raises(ValueError, match=sentence):
        Mixture(streams, weights, names, seed=0)


GOLDEN_PLAN = [(0, 0), (2, 0), (0, 1), (0, 2), (0, 3), (1, 0), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 9)]
