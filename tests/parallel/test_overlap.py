"""That overlap overlaps: with it a reduction of gradients begins before backward has come to the first layer, without it after the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import runs


def order_of_events(raw: dict[str, Any]) -> list[str]:
    """Of the second training step with two microbatches, on this rank: "backward" where the first layer's gradient is there, "reduction".

    Buckets hold a few thousand elements, so that a small model has several.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from swax_megatron.build import build_trainer
    from swax_megatron.optim import megatron, zero

    events: list[str] = []
    real = {
        (zero, "_BUCKET_ELEMENTS"): zero._BUCKET_ELEMENTS,
        (megatron, "DistributedDataParallelConfig"): megatron.DistributedDataParallelConfig,
        (zero.DeepSpeedZeroOptimizer, "reduce_ipg_grads"): zero.DeepSpeedZeroOptimizer.reduce_ipg_grads,
        (_ParamAndGradBucketGroup, "start_grad_sync"): _ParamAndGradBucketGroup.start_grad_sync,
    }

    def recording(method: Any) -> Any:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            events.append("reduction")
            return method(self, *arguments, **named)

        return call

    for (owner, name), value in real.items():
        if name == "_BUCKET_ELEMENTS":
            setattr(owner, name, 4000)
        elif name == "DistributedDataParallelConfig":
            setattr(owner, name, partial(value, bucket_size=4000))
        else:
            setattr(owner, name, recording(value))
    try:
        with runs.layout(raw) as (config, groups):
            trainer, _ = build_trainer(config, groups)
            named = {name: parameter for chunk in trainer.backend.chunks for name, parameter in chunk.named_parameters()}
            (first,) = (each for name, each in named.items() if name.endswith("layers.0.input_layernorm.weight"))
            first.register_post_accumulate_grad_hook(lambda _: events.append("backward"))
            trainer.train_step()  # from which Megatron learns when a bucket is full: it overlaps nothing yet
            events.clear()
            trainer.train_step()
            trainer.feed.close()
            trainer.backend.close()
    finally:
        for (owner, name), value in real.items():
            setattr(owner, name, value)
    return events


@pytest.mark.parametrize("backend", ["zero", "megatron"])
def test_a_reduction_begins_before_backward_ends(backend: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    for overlap in (False, True):
        optimizer = {"backend": backend, "overlap_gradients": overlap}
        for events in workers(2).run(order_of_events, runs.small_config(corpus, tmp_path / str(overlap), optimizer=optimizer)):
            last = len(events) - 1 - events[::-1].index("backward")
            early = events[:last].count("reduction")
            assert events.count("backward") == 2, events
            assert events.count("reduction") >= 1 and (early > 0) == overlap, (backend, overlap, events)
            assert "reduction" not in events[: events.index("backward")], "the first microbatch is only added up"
