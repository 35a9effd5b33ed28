"""Layer kinds as Megatron-core ModuleSpecs: one TransformerLayer whose mixer is chosen by the pattern's letter."""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from torch import nn

from swax_megatron.model.feedforward import SwiGLU
from swax_megatron.model.layer import SwaxLayer
from swax_megatron.model.layers.full.mixer import FullAttentionMixer
from swax_megatron.model.layers.mlstm.mixer import MlstmMixer
from swax_megatron.model.layers.swa.mixer import AttentionMixer
from swax_megatron.model.norm import RMSNorm
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.transformer_config import SwaxTransformerConfig

MIXERS: dict[str, type[nn.Module]] = {"M": MlstmMixer, "S": AttentionMixer, "F": FullAttentionMixer}


def layer_spec(kind: str) -> ModuleSpec:
    """x + mixer(norm(x)), then x + SwiGLU(norm(x))."""
    return ModuleSpec(
        module=SwaxLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=MIXERS[kind]),
            pre_mlp_layernorm=RMSNorm,
            mlp=SwiGLU,
        ),
    )


def stage_range(config: SwaxTransformerConfig, vp_stage: int | None, pipeline_rank: int | None = None) -> range:
    """The layers of one chunk of a pipeline stage, by Megatron's own arithmetic.

    pipeline_rank: None asks this process's groups; a number reads Megatron's layout, and needs none.
    """
    if pipeline_rank is None:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    if config.pipeline_model_parallel_layout is None:
        return range(config.num_layers)
    layout = config.pipeline_model_parallel_layout.layout  # by stage, then chunk
    parts = [stage[chunk].count(LayerType.decoder) for chunk in range(len(layout[0])) for stage in layout]
    part = (vp_stage or 0) * len(layout) + pipeline_rank
    return range(sum(parts[:part]), sum(parts[: part + 1]))


def stage_spec(config: SwaxTransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (TransformerBlock does not slice an explicit list itself)."""
    kinds = parse_pattern(config.model.pattern)
    specs = [layer_spec(kinds[layer]) for layer in stage_range(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
