"""Which layers a pipeline stage holds, by the time that they take.

A stage that takes longer than the others keeps them all waiting, so layers are dealt out by their floating-point
operations at the windows that the run expects, not by number; the output head counts where it stands, on the last stage.
The embedding is a lookup of no operations, and the first stage gets nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from swax_megatron.model.cost import COSTS, forward_flops
from swax_megatron.schema import Config


def expected_windows(config: Config) -> list[tuple[float, int]]:
    """(share of the steps, window) of a whole run; the shares sum to 1."""
    window = config.window
    steady = 1.0 - window.anneal_fraction
    if window.schedule == "fixed":
        shares = [1.0] + [0.0] * (len(window.windows) - 1)
    elif window.schedule == "ramp":
        shares = [1.0 / len(window.windows)] * len(window.windows)
    else:
        shares = list(window.probabilities)
    mix = [(steady * share, size) for share, size in zip(shares, window.windows, strict=True)]
    return [(share, size) for share, size in [*mix, (window.anneal_fraction, window.anneal_window)] if share > 0]


def layer_costs(config: Config, kinds: str) -> tuple[list[float], float]:
    """Expected operations a token of every layer, and of the head, in units of one forward pass.

    Backward is twice the forward; the head computes its logits a second time there where they are too many to be kept
    (swax_megatron/model/head.py), and so do the layers under train.recompute=full, the mixers' cores under selective.
    """
    length = config.data.sequence_length
    mix = expected_windows(config)
    bare = forward_flops(config.model, length, (), kinds="")
    third = 1.0 / 3.0  # one more forward pass
    costs = {}
    for kind in set(kinds):
        flops = sum(share * (forward_flops(config.model, length, (min(size, length),), kinds=kind) - bare) for share, size in mix)
        core = sum(share * COSTS[kind].core_flops(config.model, length, min(size, length)) for share, size in mix)
        costs[kind] = flops + third * {"none": 0.0, "selective": core, "full": flops}[config.train.recompute]
    return [costs[kind] for kind in kinds], bare * third * head_passes(config)


def head_passes(config: Config) -> float:
    """Products of the head's size in a step: forward, two in backward, and the logits again where a chunk is not all tokens."""
    chunk, tokens = config.train.loss_chunk, config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
    return 4.0 if 0 < chunk < tokens else 3.0


def stage_layers(config: Config, kinds: str) -> list[int]:
    """Layers of every stage and, where the schedule interleaves, of every chunk: one number each, in the model's order.

    parallel.pipeline_layers where it is given; else the division whose costliest part is cheapest.
    """
    if config.parallel.pipeline_layers is not None:
        return list(config.parallel.pipeline_layers)
    costs, head = layer_costs(config, kinds)
    return balance(costs, config.parallel.pipeline * (config.parallel.virtual_pipeline or 1), head)


def balance(costs: Sequence[float], parts: int, last: float) -> list[int]:
    """Cut ``costs`` into ``parts`` runs of at least one, ``last`` added to the last: the smallest possible maximum and,
    among the cuts that reach it, the smallest sum of squares. Returns the length of every run.
    """
    total = [0.0, *accumulate(costs)]
    count = len(costs)

    def cost(start: int, stop: int, part: int) -> float:
        return total[stop] - total[start] + (last if part == parts - 1 else 0.0)

    @cache
    def smallest_maximum(start: int, part: int) -> float:
        if part == parts - 1:
            return cost(start, count, part)
        stops = range(start + 1, count - (parts - 1 - part) + 1)
        return min(max(cost(start, stop, part), smallest_maximum(stop, part + 1)) for stop in stops)

    limit = smallest_maximum(0, 0) * (1.0 + 1e-9)

    @cache
    def smallest_squares(start: int, part: int) -> tuple[float, tuple[int, ...]]:
        if part == parts - 1:
            final = cost(start, count, part)
            return (final**2 if final <= limit else float("inf")), (count - start,)
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for stop in range(start + 1, count - (parts - 1 - part) + 1):
            mine = cost(start, stop, part)
            if mine > limit:
                break
            squares, lengths = smallest_squares(stop, part + 1)
            best = min(best, (mine**2 + squares, (stop - start, *lengths)))
        return best

    return list(smallest_squares(0, 0)[1])
