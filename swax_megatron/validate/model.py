"""Refusals of the network and of its windows."""

from __future__ import annotations

import math
from collections import Counter

from swax_megatron.schema import Config


def check_model(config: Config, kinds: str) -> None:
    model = config.model
    for letter in model.rope_kinds:
        if letter not in "SF":
            raise ValueError(f"model.rope_kinds={model.rope_kinds!r}: {letter!r} is no attention kind; use letters of 'SF', '' for none")
    rotated = set(model.rope_kinds) & set(kinds)
    if rotated and model.attention_head_dim % 2:
        raise ValueError(
            f"model.attention_head_dim={model.attention_head_dim}: rotary positions turn pairs of channels; "
            "use an even size or model.rope_kinds=''"
        )
    if model.attention_heads % model.attention_kv_heads:
        raise ValueError(
            f"model.attention_kv_heads={model.attention_kv_heads}: must divide model.attention_heads={model.attention_heads}, "
            "so that every key-value head serves equally many query heads"
        )


def check_window(config: Config) -> None:
    window, length = config.window, config.data.sequence_length
    if not window.windows:
        raise ValueError("window.windows=[]: name at least one window, e.g. window.windows=[128,2048]")
    named = [(f"window.windows.{index}", value) for index, value in enumerate(window.windows)]
    for path, value in [*named, ("window.anneal_window", window.anneal_window), ("window.test_window", window.test_window)]:
        if not 1 <= value <= length:
            raise ValueError(f"{path}={value}: must lie between 1 and data.sequence_length={length}")
    for value, count in Counter(window.windows).items():
        if count > 1:
            raise ValueError(
                f"window.windows={window.windows}: {value} is listed {count} times; list it once, weigh by window.probabilities"
            )
    chances = window.probabilities
    if len(chances) != len(window.windows):
        raise ValueError(f"window.probabilities={chances}: needs one probability for each of window.windows={window.windows}")
    if not all(0 <= chance <= 1 for chance in chances) or not math.isclose(math.fsum(chances), 1.0, abs_tol=1e-6):
        raise ValueError(f"window.probabilities={chances}: must be between 0 and 1 and sum to 1, they sum to {math.fsum(chances):g}")
    if window.per_layer and window.schedule != "stochastic":
        raise ValueError(
            f"window.per_layer=True: window.schedule={window.schedule} draws nothing; use stochastic or window.per_layer=false"
        )
