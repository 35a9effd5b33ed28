"""Our configuration -> Megatron's TransformerConfig, extended by what our layers read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.stages import stage_layers
from swax_megatron.parallel.device import collective_backend
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config, KernelConfig, ModelConfig, ParallelConfig


@dataclass
class SwaxTransformerConfig(TransformerConfig):
    """What Megatron hands to every module it builds, with the model, the kernels and the process groups beside it."""

    model: ModelConfig | None = None
    kernels: KernelConfig | None = None
    groups: ProcessGroupCollection | None = None
    z_loss: float = 0.0
    small_products: bool = False  # projections in 8 bits (train.fp8; Megatron's own fp8 is another)
    loss_chunk: int = 0  # tokens whose logits exist at a time; 0: all
    overlap: bool = False  # tensor-parallel transfers beside products


def stage_layout(config: Config) -> list[list[str]] | None:
    """Megatron's explicit pipeline layout: what every stage (and chunk, in the model's order) holds; None without stages."""
    if config.parallel.pipeline == 1:
        return None
    stages = [["decoder"] * count for count in stage_layers(config, parse_pattern(config.model.pattern))]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _batched_exchange(parallel: ParallelConfig) -> bool:
    """Whether a pipeline stage posts its sends and receives together: over their group's communicator, where singly NCCL makes one a pair.

    Not where both neighbours of an interleaved stage are the same rank: NCCL pairs one batch's transfers by their order alone, and a stage
    would take what was sent forward for what was sent backward.
    """
    return collective_backend() == "nccl" and not (parallel.pipeline == 2 and (parallel.virtual_pipeline or 1) > 1)


def transformer_config(config: Config, groups: Groups) -> SwaxTransformerConfig:
    """Megatron's view of a run. Fusions that need CUDA extensions are off, so that one path runs everywhere."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[config.train.recompute]
    return SwaxTransformerConfig(
        model=model,
        kernels=config.kernels,
        groups=groups.collection,
        z_loss=config.optimizer.z_loss,
        loss_chunk=config.train.loss_chunk,
        small_products=config.train.fp8,
        overlap=parallel.overlap,
        num_layers=len(parse_pattern(model.pattern)),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.attention_kv_heads,
        kv_channels=model.attention_head_dim,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=stage_layout(config),
        context_parallel_size=1,  # Megatron's own stays off: the mixers exchange halos and memories themselves
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,  # parameters.initialize draws every weight by its global name
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_comm=_batched_exchange(parallel),
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        hetereogenous_dist_checkpoint=True,
        deterministic_mode=config.train.deterministic,
        **recompute,
    )
