"""What the ranks of a pool do for the tests of export and import."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests import runs


def train_and_save(raw: dict[str, Any]) -> None:
    """A few steps with open gates: at their initial values the memory hardly speaks. The masters are set, the model follows them."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        for fragment in trainer.backend.fragments(saving=False):
            if fragment.key.startswith("param.") and fragment.key.endswith("igate_proj.bias"):
                fragment.tensor.fill_(-1.0)
        trainer.backend.loaded(0)
        trainer.fit()


def resumed_logits(raw: dict[str, Any], tokens: list[list[int]]) -> list[list[list[float]]] | None:
    """The training model's logits (b, t, v) at the test window from the run's newest checkpoint; None but on the last stage.

    Forward passes go through Megatron's schedule, so that pipeline stages take part as in training.
    """
    from swax_megatron.build import build_trainer
    from swax_megatron.data.packing import pack
    from swax_megatron.parallel.context import cut_rows, sequence_context
    from swax_megatron.parallel.schedule import pipeline_schedule

    with runs.layout(raw) as (config, groups):
        trainer, checkpoints = build_trainer(config, groups)
        assert checkpoints.resume(trainer)
        rows = torch.tensor(tokens)
        batch = cut_rows(pack(torch.cat([rows, rows[:, :1]], dim=1), None, -1), groups.context)
        windows = trainer.windows.expand(config.window.test_window)

        def forward_step(iterator, chunk):
            part = next(iterator)
            context = sequence_context(part, windows, groups.context)
            logits_sbv = chunk(part.inputs_bt, context)
            return logits_sbv, lambda output: (output.float().mean(), {"logits": output.detach().clone()})

        with torch.no_grad():
            length = rows.shape[1] // groups.context_size
            chunks = trainer.backend.chunks
            reports = pipeline_schedule(chunks, forward_step, [batch], rows=len(rows), sequence_length=length, backward=False)
        if not reports:
            return None
        logits_sbv = reports[0]["logits"].contiguous()
        parts = [torch.empty_like(logits_sbv) for _ in range(groups.tensor_size)]
        dist.all_gather(parts, logits_sbv, group=groups.tensor)
        logits_btv = torch.cat(parts, dim=-1).transpose(0, 1)[..., : config.model.vocab_size].contiguous()
        pieces = list(groups.context.all_gather("logits", logits_btv)) if groups.context else [logits_btv]
        return torch.cat(pieces, dim=1).tolist()


def wrong_initial_values(raw: dict[str, Any]) -> list[str]:
    """Parameters whose declared initial value, or whose drawn one, is not what an import would start them with."""
    from swax_megatron.model.initial import fill, initial_value
    from swax_megatron.model.parameters import named_global_parameters
    from swax_megatron.model.swax import build_model

    wrong = []
    with runs.layout(raw) as (config, groups):
        for chunk in build_model(config, groups):
            for name, parameter in named_global_parameters(chunk):
                initial, shape = initial_value(name, config.model), tuple(parameter.shape)
                fresh = torch.empty(shape)
                fill(fresh, initial, name, config.train.model_seed, shape, (0,) * len(shape))
                if parameter.initial != initial or not torch.equal(fresh, parameter.detach().float()):
                    wrong.append(name)
    return wrong
