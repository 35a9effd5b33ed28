"""Several streams read as one: which source gives global sample g, and which of its sequences.

The source of sample g is drawn from (seed, g) with the weights in force at its step (a curriculum may change them); each
source is read in its own order, from its own position. The state is the number of samples drawn and the position in each source:
small integers that do not depend on how many ranks, workers or microbatches read them, so every layout sees the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swax_megatron.data.stream import SHUFFLE_TOKENS, SequenceStream
from swax_megatron.randomness import choice

Plan = list[tuple[int, int]]
_BEFORE = {"packing": "concatenate", "shuffle_tokens": SHUFFLE_TOKENS}  # what checkpoints that do not say were read with


@dataclass(frozen=True)
class StreamState:
    """Samples drawn so far, and how many of them came from each source; ``positions`` may run ahead after a skip."""

    sample: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class SequenceBatch:
    """n sequences: ``ids_bt1`` (n, T + 1) uint16 or uint32 as stored, ``mask_bt1`` (n, T + 1) bool, ``source_b`` (n,) int64.

    ``tokens_b`` (n,) int64: input positions of each that are no padding.
    """

    ids_bt1: np.ndarray
    mask_bt1: np.ndarray
    source_b: np.ndarray
    tokens_b: np.ndarray


def replica_rows(plan: Plan, replica: int, replicas: int) -> Plan:
    """The rows of a global batch that one of ``replicas`` readers takes: contiguous, equally many."""
    rows = len(plan) // replicas
    return plan[replica * rows : (replica + 1) * rows]


class Mixture:
    """streams: one a source, all with the same sequence length.  weights: shares, need not sum to 1.  names: unique.

    curriculum: (step, weights), in the order of steps: from that step on, these weights.
    Raises ValueError for weights or names that do not fit.
    """

    def __init__(
        self,
        streams: Sequence[SequenceStream],
        weights: Sequence[float],
        names: Sequence[str],
        seed: int,
        curriculum: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        if not streams or not len(streams) == len(weights) == len(names):
            counts = f"{len(streams)} sources, {len(weights)} weights, {len(names)} names"
            raise ValueError(f"a mixture needs a weight and a name for each source, at least one; got {counts}")
        for _, phase in [(0, weights), *curriculum]:
            _check_weights(names, phase)
        repeated = sorted({name for name in names if list(names).count(name) > 1})
        if repeated:
            raise ValueError(f"two sources are named {repeated[0]!r}: give each source a name of its own")
        if len({stream.sequence_length for stream in streams}) > 1:
            raise ValueError("all sources of a mixture must have the same sequence_length")
        self.streams, self.names, self.seed = list(streams), list(names), seed
        self.weights = [float(weight) for weight in weights]
        self.curriculum = [(step, [float(weight) for weight in phase]) for step, phase in curriculum]
        self.sequence_length = streams[0].sequence_length
        self.dtype = np.result_type(*(stream.dataset.dtype for stream in streams))

    def initial_state(self) -> StreamState:
        """Nothing read yet."""
        return StreamState(0, (0,) * len(self.streams))

    def weights_at(self, step: int) -> list[float]:
        """The weights in force at a step."""
        weights = self.weights
        for first, phase in self.curriculum:
            if step >= first:
                weights = phase
        return weights

    def plan(self, state: StreamState, n: int, step: int = 0) -> tuple[Plan, StreamState]:
        """The (source, index) of the next n global samples, drawn at ``step``, and the state after them; pure, reads no data."""
        if len(state.positions) != len(self.streams):
            raise ValueError(f"the state has {len(state.positions)} sources, the mixture {len(self.streams)}")
        positions = list(state.positions)
        plan: Plan = []
        weights = self.weights_at(step)
        for sample in range(state.sample, state.sample + n):
            source = choice(weights, "mixture-source", self.seed, sample)
            plan.append((source, positions[source]))
            positions[source] += 1
        return plan, StreamState(state.sample + n, tuple(positions))

    def load(self, plan: Sequence[tuple[int, int]]) -> SequenceBatch:
        """Read the sequences of a plan, or of one rank's slice of it."""
        ids_bt1 = np.empty((len(plan), self.sequence_length + 1), self.dtype)
        mask_bt1 = np.empty((len(plan), self.sequence_length + 1), bool)
        filled = [self.streams[source].read_into(index, ids_bt1[row], mask_bt1[row]) for row, (source, index) in enumerate(plan)]
        tokens_b = np.minimum(np.array(filled, np.int64), self.sequence_length)
        return SequenceBatch(ids_bt1, mask_bt1, np.array([source for source, _ in plan], np.int64), tokens_b)

    def epochs(self, state: StreamState) -> dict[str, float]:
        """How many times each source has been read, by name."""
        return {name: p / s.per_epoch for name, p, s in zip(self.names, state.positions, self.streams, strict=True)}

    def state_to_json(self, state: StreamState) -> dict[str, Any]:
        """The state with what identifies each source, keyed by its name."""
        sources = {
            name: {
                "position": position,
                "sequences_per_epoch": stream.per_epoch,
                "data_set": stream.dataset.fingerprint,
                "packing": stream.packing,
                "shuffle_tokens": stream.shuffle_tokens,
                "skipped": sorted(stream.dataset.skipped),
            }
            for name, position, stream in zip(self.names, state.positions, self.streams, strict=True)
        }
        return {"sample": state.sample, "seed": self.seed, "sequence_length": self.sequence_length, "sources": sources}

    def state_from_json(self, saved: dict[str, Any], *, allow_new: bool = False) -> StreamState:
        """The state that ``state_to_json`` gave, in this mixture's order of sources.

        Weights may have changed: they act on samples not drawn yet. With ``allow_new`` a further source starts at its
        beginning. Shards that the run left out stay left out, repaired or not: its order was made without them.
        ValueError, naming it, for a source that was added without ``allow_new``, removed, renamed or written anew, for one that lost
        another shard, and for another seed, sequence length, packing or shuffling: the order could not be continued exactly.
        """
        for key, value in (("seed", self.seed), ("sequence_length", self.sequence_length)):
            if saved[key] != value:
                raise ValueError(f"the checkpoint read its data with {key}={saved[key]}, not {value}: set it back or start a new run")
        sources = saved["sources"]
        for name in self.names:
            if name not in sources and not allow_new:
                known = ", ".join(sources)
                raise ValueError(f"source {name!r} is not among the checkpoint's ({known}): keep the sources or start a new run")
        for name in sources:
            if name not in self.names:
                raise ValueError(f"the checkpoint's source {name!r} is missing from the configuration: keep it (weight 0 if it is used up)")
        for name, stream in zip(self.names, self.streams, strict=True):
            if name in sources and sources[name]["data_set"] != stream.dataset.fingerprint:
                raise ValueError(f"source {name!r} at {stream.dataset.path} is not what the checkpoint read: its manifest differs")
            for key, value in (("packing", stream.packing), ("shuffle_tokens", stream.shuffle_tokens)):
                before = sources[name].get(key, _BEFORE[key]) if name in sources else value
                if before != value:
                    raise ValueError(f"the checkpoint read {name!r} with {key}={before!r}, not {value!r}: set it back or start a new run")
        self.streams = [
            _with_shards_of(stream, name, set(sources[name].get("skipped", []))) if name in sources else stream
            for name, stream in zip(self.names, self.streams, strict=True)
        ]
        return StreamState(int(saved["sample"]), tuple(int(sources[name]["position"]) if name in sources else 0 for name in self.names))


def _check_weights(names: Sequence[str], weights: Sequence[float]) -> None:
    if len(weights) != len(names):
        raise ValueError(f"a mixture needs a weight for each source: {len(weights)} weights, {len(names)} sources")
    for name, weight in zip(names, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight of source {name!r} is {weight}: must be a finite number of 0 or more")
    if not any(weight > 0 for weight in weights):
        raise ValueError(f"the weights of all sources ({', '.join(names)}) are 0: give at least one a weight above 0")


def _with_shards_of(stream: SequenceStream, name: str, skipped: set[str]) -> SequenceStream:
    """The stream over the shards that the run read: without ``skipped``, and with all others."""
    dataset = stream.dataset
    lost = sorted(set(dataset.skipped) - skipped)
    if lost:
        raise ValueError(
            f"source {name!r} lost {', '.join(lost)} since the checkpoint ({dataset.skipped[lost[0]]}): without it the order of the data "
            "cannot be continued exactly; restore the file, or start a new run"
        )
    return stream if skipped == set(dataset.skipped) else stream.reopened(dataset.without(skipped))
