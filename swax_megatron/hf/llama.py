"""Llama-style weights, layer by layer, into the attention layers of a SWAX model that is trained on from there.

The same block: x + attention(RMSNorm(x)), x + SwiGLU(RMSNorm(x)), rotate-half RoPE, grouped-query heads, no biases. mLSTM
layers have no counterpart; of a layer that is given to one by number, only the feed-forward network and its norm are taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from swax_megatron.hf.names import EMBEDDING, OUTPUT
from swax_megatron.hf.taken import Source, Taken, field_of, need
from swax_megatron.schema import ModelConfig

MODEL_TYPES = ("llama", "mistral")
PARTS = ("embedding", "head", "final_norm")  # what may be left out besides layers
_FINAL_NORM = "decoder.final_layernorm.weight"

_FEED_FORWARD = {
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
_ATTENTION = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.k_proj.weight": "self_attn.k_proj.weight",
    "self_attention.v_proj.weight": "self_attn.v_proj.weight",
    "self_attention.out_proj.weight": "self_attn.o_proj.weight",
}


def layer_map(text: str, kinds: str, layers: int) -> dict[int, int]:
    """Layer of ours -> layer of theirs.

    order: the k-th attention layer takes the k-th source layer; index: layer i takes layer i; or pairs such as ``1=0,3=2``.
    ValueError for a pair that names no layer.
    """
    if text == "order":
        attention = [index for index, kind in enumerate(kinds) if kind != "M"]
        return dict(zip(attention, range(layers), strict=False))
    if text == "index":
        return {index: index for index in range(min(len(kinds), layers))}
    pairs = [re.fullmatch(r"\s*(\d+)\s*=\s*(\d+)\s*", pair) for pair in text.split(",")]
    if not all(pairs):
        raise ValueError(f"--layers {text!r}: write order, index, or pairs OURS=THEIRS such as 1=0,3=2")
    found = {int(pair[1]): int(pair[2]) for pair in pairs}
    for ours, theirs in found.items():
        if ours >= len(kinds) or theirs >= layers:
            raise ValueError(f"--layers {ours}={theirs}: the model has layers 0 to {len(kinds) - 1}, the source 0 to {layers - 1}")
    if len(found) != len(pairs):
        raise ValueError(f"--layers {text!r}: a layer of the model is named twice")
    return found


def llama_source(raw: dict[str, Any], layers_text: str = "order", without: Collection[str] = ()) -> Source:
    """How a Llama-style folder becomes a training checkpoint. ``raw``: its config.json; ``without``: some of PARTS."""
    what = f"this {raw['model_type']}"
    need(raw, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, what)
    layers, hidden = field_of(raw, "num_hidden_layers", what), field_of(raw, "hidden_size", what)
    heads = field_of(raw, "num_attention_heads", what)
    tied = bool(raw.get("tie_word_embeddings", False))
    fixed = {
        "hidden_size": hidden,
        "ffn_hidden_size": field_of(raw, "intermediate_size", what),
        "attention_heads": heads,
        "attention_kv_heads": raw.get("num_key_value_heads") or heads,
        "attention_head_dim": raw.get("head_dim") or hidden // heads,
        "rope_base": _rope_base(raw, what),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
    }
    if not {"embedding", "head"} <= set(without):
        fixed["vocab_size"] = field_of(raw, "vocab_size", what)
    suggested = {"pattern": f"Fx{layers}", "rope_kinds": "SF", "logit_cap": None, "tie_embeddings": tied}

    def plan(kinds: str, model: ModelConfig) -> dict[str, Taken]:
        if model.tie_embeddings and not tied and not {"embedding", "head"} & set(without):
            raise ValueError(
                f"model.tie_embeddings=true, but {what} has a head of its own: set it to false, or leave one out with --without head"
            )
        taken: dict[str, Taken] = {}
        if "embedding" not in without:
            taken[EMBEDDING] = Taken("model.embed_tokens.weight")
        if "head" not in without and not (model.tie_embeddings and EMBEDDING in taken):
            taken[EMBEDDING if model.tie_embeddings else OUTPUT] = Taken("model.embed_tokens.weight" if tied else "lm_head.weight")
        for ours, theirs in layer_map(layers_text, kinds, layers).items():
            parts = _FEED_FORWARD if kinds[ours] == "M" else {**_ATTENTION, **_FEED_FORWARD}
            taken |= {f"decoder.layers.{ours}.{a}": Taken(f"model.layers.{theirs}.{b}") for a, b in parts.items()}
        if "final_norm" not in without:
            taken[_FINAL_NORM] = Taken("model.norm.weight")
        return taken

    known = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    for index in range(layers):
        known |= {f"model.layers.{index}.{name}" for name in (*_ATTENTION.values(), *_FEED_FORWARD.values())}
        known.add(f"model.layers.{index}.self_attn.rotary_emb.inv_freq")  # a constant that old checkpoints hold
    return Source("llama", fixed, suggested, plan, lambda plan: known)


def _rope_base(raw: dict[str, Any], what: str) -> float:
    """The base of plain rotary angles; ValueError for scaled ones, which have no counterpart."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{what} cannot be imported: its rotary positions are scaled (rope_type {kind!r}), ours are plain")
    if parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{what} cannot be imported: only a part of each head is rotated, here all of it is")
    return float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
