"""The range of every number of the configuration: a test refuses a numeric field that stands in none of these lists."""

from __future__ import annotations

import math
from typing import Any

from swax_megatron.schema import Config

AT_LEAST_ONE = (
    "model.hidden_size model.ffn_hidden_size model.vocab_size model.attention_heads model.attention_kv_heads "
    "model.attention_head_dim model.mlstm_heads model.mlstm_qk_dim model.mlstm_v_dim data.sequence_length parallel.tensor "
    "parallel.pipeline parallel.virtual_pipeline parallel.context train.micro_batch_size train.global_batch_size "
    "data.shuffle_tokens validation.sequences kernels.mlstm_chunk monitor.log_interval "
    "resilience.spike_history resilience.spike_minimum resilience.straggler_factor resilience.fault_steps"
).split()
NOT_NEGATIVE = (
    "window.check_interval optimizer.min_learning_rate optimizer.warmup optimizer.weight_decay optimizer.clip_grad "
    "optimizer.z_loss data.workers data.prefetch data.retries train.loss_chunk train.steps train.threads validation.interval "
    "checkpoint.interval checkpoint.keep_last checkpoint.keep_every monitor.memory_interval monitor.recall_interval "
    "resilience.spike_threshold resilience.spike_patience resilience.max_skips resilience.max_rewinds resilience.hang_factor "
    "resilience.straggler_interval resilience.fault_rank resilience.fault_step resilience.fault_seconds"
).split()
POSITIVE = (
    "model.rope_base model.gate_cap model.norm_eps model.logit_cap model.init_std model.embedding_init_std "
    "optimizer.learning_rate optimizer.eps train.distributed_timeout data.cache_gib monitor.peak_tflops "
    "resilience.hang_minimum resilience.hang_unknown"
).split()
SEEDS = "train.model_seed train.data_seed train.window_seed validation.seed".split()
FRACTION = "window.anneal_fraction optimizer.decay_fraction".split()
BELOW_ONE = "optimizer.beta1 optimizer.beta2".split()
BIAS = ["model.mlstm_igate_bias"]  # beyond it the soft cap of the gates leaves no gradient


def check_ranges(config: Config) -> None:
    rules = (
        (AT_LEAST_ONE, lambda x: x >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "must be 0 or more"),
        (SEEDS, lambda x: 0 <= x < 2**63, "must be 0 or more and less than 2^63"),
        (POSITIVE, lambda x: 0 < x < math.inf, "must be more than 0 and finite"),
        (["train.distributed_timeout"], lambda x: x <= 30 * 86400, "must be at most 30 days, in seconds"),
        (FRACTION, lambda x: 0 <= x <= 1, "must lie between 0 and 1"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
        (BIAS, lambda x: -30 <= x <= 30, "must lie between -30 and 30"),
    )
    for paths, holds, requirement in rules:
        for path in paths:
            value = _value(config, path)
            if value is not None and not holds(value):
                raise ValueError(f"{path}={value!r}: {requirement}")
    if not config.run_dir:
        raise ValueError("run_dir='': name a folder for this run, e.g. run_dir=runs/first")


def _value(config: Config, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node
