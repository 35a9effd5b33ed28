"""Refusals of the optimizer, of checkpoints and of the kernels."""

from __future__ import annotations

from swax_megatron.config import field_paths
from swax_megatron.schema import Config


def check_optimizer(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    if optimizer.backend == "zero" and optimizer.zero_stage != 1:
        reason = {
            0: "without sharding the optimizer backend megatron does the same work",
            2: "stage 2 shards gradients, which the pipeline schedules accumulate whole in any case, so it would save nothing over stage 1",
            3: "stage 3 gathers weights inside the forward pass and could run with parallel.pipeline=1 only; it is not built yet",
        }.get(optimizer.zero_stage, "ZeRO has the stages 0 to 3, and stage 1 is the one that runs at every parallel.pipeline")
        raise ValueError(f"optimizer.zero_stage={optimizer.zero_stage}: {reason}; use optimizer.zero_stage=1 or optimizer.backend=megatron")
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise ValueError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate}: must not exceed optimizer.learning_rate={optimizer.learning_rate}"
        )
    unit = train.global_batch_size * config.data.sequence_length if optimizer.schedule_unit == "tokens" else 1
    total = train.steps * unit
    if total and optimizer.warmup > total:
        raise ValueError(
            f"optimizer.warmup={optimizer.warmup}: the run has {total} {optimizer.schedule_unit} and would end in its warm-up; "
            f"use e.g. optimizer.warmup={max(1, total // 10)}, or more train.steps"
        )


def check_checkpoint(config: Config) -> None:
    known = set(field_paths())
    for name in config.checkpoint.allow_change:
        if name.startswith("model."):
            raise ValueError(f"checkpoint.allow_change: {name} is part of a checkpoint's identity and can never change; use a new run_dir")
        if name not in known:
            raise ValueError(f"checkpoint.allow_change: {name!r} is no field of the configuration; use a full name such as train.steps")


def check_kernels(config: Config, cuda: bool | None) -> None:
    if config.kernels.backend != "triton":
        return
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()
    if not cuda:
        raise ValueError("kernels.backend='triton': Triton kernels need a CUDA GPU and there is none; use kernels.backend=auto")


def check_resilience(config: Config, world_size: int | None) -> None:
    resilience = config.resilience
    if resilience.spike_minimum > resilience.spike_history:
        raise ValueError(
            f"resilience.spike_minimum={resilience.spike_minimum}: only resilience.spike_history={resilience.spike_history} losses are "
            "kept, so no step would ever be judged; lower spike_minimum or raise spike_history"
        )
    if resilience.fault != "none" and world_size is not None and resilience.fault_rank >= world_size:
        raise ValueError(f"resilience.fault_rank={resilience.fault_rank}: the run has the ranks 0 to {world_size - 1}; name one of them")
