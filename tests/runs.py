"""Small runs of the real trainer, as tasks for the process pools of tests/workers.py."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swax_megatron.config import from_dict
from swax_megatron.schema import Config
from swax_megatron.validate import validate

SEQUENCE_LENGTH = 92  # no multiple of the mLSTM chunk (16); divisible by the tensor-parallel degrees


def small_config(corpus: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run with M and S layers on every stage of four, two sources, windows of at most a quarter of the row.

    Two values keep rounding noise from growing, so that layouts can be compared to the precision of fp32. AdamW's eps
    is far above the gradients' noise: only then is an update a smooth function of them. The norms' eps is large: where a
    query hardly meets its keys the head norm is a sign function of steepness 1/sqrt(eps), and at the default of 1e-6 the
    gradient norm of two runs that differ in the last bit can part by 1e-3 within two steps.
    """
    raw: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "pattern": "(MS)x4",
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "vocab_size": 200,
            "attention_heads": 4,
            "attention_kv_heads": 2,
            "mlstm_heads": 4,
            "init_std": 0.1,
            "norm_eps": 1e-2,
        },
        "window": {"windows": [5, 23], "probabilities": [0.5, 0.5], "anneal_fraction": 0.2, "check_interval": 2},
        "data": {
            "train": [{"path": str(corpus / "a"), "weight": 2.0}, {"path": str(corpus / "b"), "weight": 1.0}],
            "validation": [{"path": str(corpus / "validation")}],
            "sequence_length": SEQUENCE_LENGTH,
        },
        "optimizer": {"learning_rate": 5e-3, "warmup": 2, "eps": 1e-2, "clip_grad": 0.5},
        "train": {"steps": 4, "micro_batch_size": 1, "global_batch_size": 4, "precision": "fp32", "loss_chunk": 32},
        "validation": {"interval": 0, "sequences": 5},
        "checkpoint": {"interval": 0},
        "kernels": {"backend": "reference", "mlstm_chunk": 16},
        "monitor": {"peak_tflops": 1.0},
    }
    for name, fields in sections.items():
        raw[name] = {**raw[name], **fields} if name in raw else fields
    return raw


@contextlib.contextmanager
def layout(raw: dict[str, Any]) -> Iterator[tuple[Config, Any]]:
    """Validate a configuration, build its process groups, and take them down again; on every rank of a pool."""
    from megatron.core import parallel_state

    from swax_megatron.parallel import groups

    config = from_dict(raw)
    validate(config, int(os.environ["WORLD_SIZE"]))
    state = groups.initialize(config)
    yield config, state
    dist.barrier(group=state.cpu)
    parallel_state.destroy_model_parallel()  # which forgets its groups; their threads and sockets would pile up
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    del state
    gc.collect()  # models and optimizers hold groups in cycles; a group's threads live as long as it does


def train(raw: dict[str, Any]) -> dict[str, list[float]]:
    """A whole run (resumed where it left a checkpoint); its metrics by name, one value a step."""
    with layout(raw) as (config, groups):
        return _train(config, groups)


def _train(config: Config, groups: Any) -> dict[str, list[float]]:
    from swax_megatron.build import build_trainer
    from swax_megatron.callbacks.callback import Callback

    history: dict[str, list[float]] = {}

    class Record(Callback):
        def after_step(self, trainer: Any, result: Any) -> None:
            for name in ("loss/train", "optim/grad_norm", "loss/validation", "window/size", "data/targets"):
                if name in result.metrics:
                    history.setdefault(name, []).append(result.metrics[name])

    trainer, checkpoints = build_trainer(config, groups)
    trainer.callbacks.append(Record())
    resumed = checkpoints.resume(trainer)
    history["first_step"] = [float(trainer.state.step)]
    assert resumed or trainer.state.step == 0
    trainer.fit()
    return history


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Master weights and moments of a saved step, whole."""
    from swax_megatron.checkpoint.store import open_checkpoint

    checkpoint = open_checkpoint(run_dir / "checkpoints" / f"step_{step}")
    return {key: checkpoint.read_tensor(key) for key in checkpoint.keys()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str = "param.") -> tuple[float, str]:
    """The largest absolute difference of tensors of the same name, and that name."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max(((a[key] - b[key]).abs().max().item(), key) for key in a if key.startswith(prefix))
