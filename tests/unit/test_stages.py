"""Pipeline stages balanced by operations."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from swax_megatron import randomness
from swax_megatron.config import load_config
from swax_megatron.model.cost import COSTS, forward_flops
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.stages import balance, expected_windows, layer_costs, stage_layers
from swax_megatron.schema import Config

ROOT = Path(__file__).parents[2]


def brute_force(costs: list[float], parts: int, last: float) -> float:
    """The smallest possible cost of the costliest part, by trying every cut."""
    maxima = []
    for cuts in itertools.combinations(range(1, len(costs)), parts - 1):
        edges = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        maxima.append(max(*sums[:-1], sums[-1] + last) if parts > 1 else sums[0] + last)
    return min(maxima)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_no_cut_is_better(parts: int, seed: int) -> None:
    costs = [float(x) ** 2 + 0.1 for x in randomness.normal(0, 9, "test", seed)]
    last = 2.0 * seed
    lengths = balance(costs, parts, last)
    assert len(lengths) == parts and sum(lengths) == len(costs) and min(lengths) >= 1
    edges = list(itertools.accumulate([0, *lengths]))
    sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
    sums[-1] += last
    assert max(sums) == pytest.approx(brute_force(costs, parts, last))


def test_equal_layers_without_a_head_are_dealt_out_equally() -> None:
    assert balance([1.0] * 8, 4, 0.0) == [2, 2, 2, 2]
    assert sorted(balance([1.0] * 10, 4, 0.0)) == [2, 2, 3, 3]
    assert balance([1.0] * 9, 2, 1.0) == [5, 4]


def shipped(**parallel: object) -> Config:
    config = load_config(ROOT / "configs" / "swax_1p4b.yaml", ["train.recompute=selective", "train.loss_chunk=1024"])
    for name, value in {"pipeline_layers": None, "virtual_pipeline": None, **parallel}.items():
        setattr(config.parallel, name, value)
    return config


def test_the_head_takes_its_share_of_the_last_stage() -> None:
    """1.4B: the head is worth 1.7 layers, counted with its second product in backward."""
    config = shipped(pipeline=4)
    kinds = parse_pattern(config.model.pattern)
    costs, head = layer_costs(config, kinds)
    assert 1.5 < head / costs[0] < 2.0
    assert stage_layers(config, kinds) == [6, 6, 7, 5]
    length, mix = config.data.sequence_length, expected_windows(config)
    model = sum(share * forward_flops(config.model, length, [window] * len(kinds)) for share, window in mix)
    cores = sum(share * COSTS[kind].core_flops(config.model, length, window) for kind in kinds for share, window in mix)
    assert cores > 0
    assert sum(costs) + head == pytest.approx(model + cores / 3.0 + head / 4.0)  # 4/3 of the head's forward pass, and of the cores'
    config.train.recompute = "none"
    assert sum(layer_costs(config, kinds)[0]) + head == pytest.approx(model + head / 4.0)
    config.train.loss_chunk = 0  # the logits are kept
    costs, once = layer_costs(config, kinds)
    assert once == pytest.approx(0.75 * head) and sum(costs) + once == pytest.approx(model)


def test_long_windows_and_full_attention_weigh_more() -> None:
    config = shipped(pipeline=2)
    config.data.sequence_length = 131072
    costs, _ = layer_costs(config, "MSF")
    assert costs[2] > 2 * costs[1] > 2 * costs[0]
    narrow = dict(zip("MSF", costs, strict=True))
    config.window.windows, config.window.anneal_window = [4096, 32768], 32768
    wide = dict(zip("MSF", layer_costs(config, "MSF")[0], strict=True))
    assert wide["S"] > 2 * narrow["S"] and wide["M"] == narrow["M"] and wide["F"] == narrow["F"]
    first = {kind: balance(layer_costs(config, f"{kind}MSMSMSMSMS")[0], 2, 0.0)[0] for kind in "SF"}
    assert first["F"] < first["S"]  # the stage that holds an F layer gets fewer


def mixed(config: Config) -> dict[int, float]:
    """The share of the steps at every window."""
    found: dict[int, float] = {}
    for share, window in expected_windows(config):
        found[window] = found.get(window, 0.0) + share
    return found


def test_shares_of_the_windows() -> None:
    config = shipped()
    config.window.windows, config.window.probabilities = [128, 2048], [0.75, 0.25]
    config.window.anneal_fraction, config.window.anneal_window = 0.2, 2048
    assert mixed(config) == pytest.approx({128: 0.6, 2048: 0.4})
    config.window.schedule = "ramp"
    assert mixed(config) == pytest.approx({128: 0.4, 2048: 0.6})
    config.window.schedule, config.window.anneal_fraction = "fixed", 0.0
    assert mixed(config) == pytest.approx({128: 1.0})


def test_given_layers_overrule() -> None:
    config = shipped(pipeline=2, pipeline_layers=[20, 4])
    assert stage_layers(config, parse_pattern(config.model.pattern)) == [20, 4]
    assert len(stage_layers(shipped(pipeline=4, virtual_pipeline=2), parse_pattern(config.model.pattern))) == 8
