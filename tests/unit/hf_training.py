"""The training model itself, as a task for the process pools of tests/workers.py."""

from __future__ import annotations

from typing import Any

import torch

from tests.runs import layout


def random_checkpoint(raw: dict[str, Any], root: str, ids: list[list[int]]) -> list[list[list[float]]]:
    """Save the training model with random weights as ``root/step_3``; its logits of ``ids`` (b, t, v) at the test window.

    The weights are those that the optimizer would save: the names of the parameters and their global shapes.
    """
    from swax_megatron.checkpoint.store import Fragment, save
    from swax_megatron.config import to_dict
    from swax_megatron.model.pattern import parse_pattern
    from swax_megatron.model.swax import build_model
    from swax_megatron.parallel.context import SequenceContext

    with layout(raw) as (config, groups):
        (model,) = build_model(config, groups)
        torch.manual_seed(0)
        fragments = []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.uniform_(-4.0, 4.0)
                else:
                    parameter.normal_(0.0, (4.0 if "embedding" in name else 1.0) * parameter.shape[1] ** -0.5)
                fragments.append(Fragment(f"param.{name}", tuple(parameter.shape), (0,) * parameter.dim(), parameter.detach()))
            ids_bt = torch.tensor(ids)
            batch, length = ids_bt.shape
            context = SequenceContext(
                windows=tuple(config.window.test_window if kind == "S" else length for kind in parse_pattern(config.model.pattern)),
                cu_seqlens=torch.arange(0, batch * length + 1, length, dtype=torch.int32),
                positions_bt=torch.arange(length).expand(batch, -1),
            )
            logits_btv = model.eval()(ids_bt, context).transpose(0, 1)
        save(root, 3, fragments, config=to_dict(config), state={"tokens_seen": 12345})
        return logits_btv[..., : config.model.vocab_size].tolist()
