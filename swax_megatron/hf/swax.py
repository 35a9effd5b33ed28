"""Our own export as the source of an import: the inverse of ``hf/export.py``."""

from __future__ import annotations

from typing import Any

from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.names import LAYER_TYPES, hf_names
from swax_megatron.hf.taken import Source, Taken, need
from swax_megatron.hf.xlstm import CELL_EPS
from swax_megatron.schema import ModelConfig

_KINDS = {name: kind for kind, name in LAYER_TYPES.items()}


def swax_source(raw: dict[str, Any]) -> Source:
    """How an export becomes a training checkpoint again. ``raw``: its config.json. ValueError for an unknown layer type."""
    need(raw, {"mlstm_eps": CELL_EPS}, "this SWAX model")
    config = SwaxConfig(**{name: value for name, value in raw.items() if name not in ("model_type", "architectures", "auto_map")})
    kinds = "".join(_KINDS[layer_type] for layer_type in config.layer_types)
    fixed = {
        "pattern": kinds,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "gate_cap": config.gate_cap,
        "norm_eps": config.norm_eps,
        "logit_cap": config.logit_cap,
        "tie_embeddings": config.tie_word_embeddings,
        "attention_heads": config.num_attention_heads,
        "attention_kv_heads": config.num_key_value_heads,
        "attention_head_dim": config.head_dim,
        "rope_kinds": "".join(_KINDS[layer_type] for layer_type in config.rope_layer_types),
        "rope_base": config.rope_theta,
        "mlstm_heads": config.num_mlstm_heads,
        "mlstm_qk_dim": config.mlstm_qk_head_dim,
        "mlstm_v_dim": config.mlstm_v_head_dim,
        "init_std": config.initializer_range,
    }

    def plan(kinds: str, model: ModelConfig) -> dict[str, Taken]:
        return {ours: Taken(theirs) for ours, theirs in hf_names(kinds, tied=config.tie_word_embeddings).items()}

    return Source("swax", fixed, {}, plan)
