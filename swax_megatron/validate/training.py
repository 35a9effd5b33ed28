"""Refusals of the optimizer, of checkpoints and of the kernels."""

from __future__ import annotations

from swax_megatron.batching import rows_before
from swax_megatron.config import field_paths
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import Config


def check_optimizer(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise ValueError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate}: must not exceed optimizer.learning_rate={optimizer.learning_rate}"
        )
    total = rows_before(config, train.steps) * config.data.sequence_length if optimizer.schedule_unit == "tokens" else train.steps
    if total and optimizer.warmup > total:
        raise ValueError(
            f"optimizer.warmup={optimizer.warmup}: the run has {total} {optimizer.schedule_unit} and would end in its warm-up; "
            f"use e.g. optimizer.warmup={max(1, total // 10)}, or more train.steps"
        )


def check_batch_ramp(config: Config) -> None:
    before = 0
    for index, phase in enumerate(config.train.batch_ramp):
        where = f"train.batch_ramp.{index}"
        if phase.until_step <= before:
            raise ValueError(f"{where}.until_step={phase.until_step}: must be more than {before}, where the phase before it ends")
        if phase.rows < 1:
            raise ValueError(f"{where}.rows={phase.rows}: must be at least 1")
        before = phase.until_step


def check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_every and (not checkpoint.interval or checkpoint.keep_every % checkpoint.interval):
        raise ValueError(
            f"checkpoint.keep_every={checkpoint.keep_every}: must be a multiple of checkpoint.interval={checkpoint.interval}, "
            "or no checkpoint falls on its steps"
        )
    if checkpoint.remote is not None and "://" not in checkpoint.remote:
        raise ValueError(f"checkpoint.remote={checkpoint.remote!r}: give a URL, e.g. s3://bucket/run or file:///mnt/archive/run")
    known = set(field_paths()) if config.checkpoint.allow_change else set()
    for name in config.checkpoint.allow_change:
        if name.startswith("model."):
            raise ValueError(f"checkpoint.allow_change: {name} is part of a checkpoint's identity and can never change; use a new run_dir")
        if name not in known:
            raise ValueError(f"checkpoint.allow_change: {name!r} is no field of the configuration; use a full name such as train.steps")


def check_monitor(config: Config) -> None:
    parallel = config.parallel
    if config.monitor.recall_interval and parallel.tensor * parallel.pipeline * parallel.context > 1:
        raise ValueError(
            f"monitor.recall_interval={config.monitor.recall_interval}: the test in training needs parallel.tensor, parallel.pipeline and "
            "parallel.context of 1; set it to 0 and test a checkpoint with python -m swax_megatron.eval --recall"
        )


def check_kernels(config: Config, cuda: bool | None) -> None:
    if config.kernels.backend != "triton":
        return
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()
    if not cuda:
        raise ValueError("kernels.backend='triton': Triton kernels need a CUDA GPU and there is none; use kernels.backend=auto")


def check_fp8(config: Config, cuda: bool | None) -> None:
    if not config.train.fp8:
        return
    if config.train.precision != "bf16":
        raise ValueError(f"train.fp8=true: needs train.precision=bf16, not {config.train.precision}; set that or train.fp8=false")
    if config.optimizer.backend == "zero" and config.optimizer.zero_stage == 3:
        raise ValueError("train.fp8=true: not with optimizer.zero_stage=3, which gathers weights in bf16; use stage 0, 1 or 2")
    if config.kernels.backend == "reference":
        raise ValueError("train.fp8=true: tensors are scaled and turned by Triton kernels; use kernels.backend=auto or train.fp8=false")
    if config.parallel.overlap:
        raise ValueError("train.fp8=true: parallel.overlap=true runs transfers beside products in bf16 only; set one of them to false")
    model, tensor, kinds = config.model, config.parallel.tensor, set(parse_pattern(config.model.pattern))
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size // tensor,
        "data.sequence_length": config.data.sequence_length // config.parallel.context,
    }
    if "M" in kinds:
        widths["model.mlstm_heads * model.mlstm_qk_dim"] = model.mlstm_heads * model.mlstm_qk_dim // tensor
        widths["model.mlstm_heads * model.mlstm_v_dim"] = model.mlstm_heads * model.mlstm_v_dim // tensor
    if kinds - {"M"}:
        widths["model.attention_heads * model.attention_head_dim"] = model.attention_heads * model.attention_head_dim // tensor
        widths["model.attention_kv_heads * model.attention_head_dim"] = model.attention_kv_heads * model.attention_head_dim // tensor
    for name, width in widths.items():
        if width % 16:
            raise ValueError(f"train.fp8=true: {name} is {width} a process and must be a multiple of 16; change it or set train.fp8=false")
    if cuda is None:
        import torch

        from swax_megatron.kernels.fp8 import missing

        reason = missing(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        reason = None if cuda else "there are none on cpu"
    if reason is not None:
        raise ValueError(f"train.fp8=true: products in 8 bits cannot run here, {reason}; set train.fp8=false")


def check_resilience(config: Config, world_size: int | None) -> None:
    resilience = config.resilience
    if resilience.spike_minimum > resilience.spike_history:
        raise ValueError(
            f"resilience.spike_minimum={resilience.spike_minimum}: only resilience.spike_history={resilience.spike_history} losses are "
            "kept, so no step would ever be judged; lower spike_minimum or raise spike_history"
        )
    if resilience.fault != "none" and world_size is not None and resilience.fault_rank >= world_size:
        raise ValueError(f"resilience.fault_rank={resilience.fault_rank}: the run has the ranks 0 to {world_size - 1}; name one of them")
