"""Training names <-> names in the Hugging Face export, for a whole model. Imports neither megatron nor transformers."""

from __future__ import annotations

from collections.abc import Callable

from swax_megatron.model.layers.full.hf_names import HF_NAMES as FULL
from swax_megatron.model.layers.mlstm.hf_names import HF_NAMES as MLSTM
from swax_megatron.model.layers.swa.hf_names import HF_NAMES as SWA

MIXERS = {"M": MLSTM, "S": SWA, "F": FULL}
LAYER_TYPES = {"M": "linear_attention", "S": "sliding_attention", "F": "full_attention"}
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

_EVERY_LAYER = {
    name: name
    for name in (
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    )
}


def layer_types(kinds: str) -> list[str]:
    """transformers' names of the layer kinds in ``kinds``, an expanded pattern such as "MSMS". ValueError for an unknown kind."""
    return _each(kinds, LAYER_TYPES.__getitem__)


def hf_names(kinds: str, *, tied: bool) -> dict[str, str]:
    """Every parameter of a model, in the order of the layers: training name -> export name.

    ``kinds``: one letter a layer (``swax_megatron.model.pattern.parse_pattern``); ``tied``: no output head of its own.
    Raises ValueError for a kind that cannot be exported.
    """
    names = {EMBEDDING: "model.embed_tokens.weight"}
    for index, mixer in enumerate(_each(kinds, MIXERS.__getitem__)):
        for training, exported in {**_EVERY_LAYER, **mixer}.items():
            names[f"decoder.layers.{index}.{training}"] = f"model.layers.{index}.{exported}"
    names["decoder.final_layernorm.weight"] = "model.norm.weight"
    if not tied:
        names[OUTPUT] = "lm_head.weight"
    return names


def _each(kinds: str, lookup: Callable) -> list:
    for index, kind in enumerate(kinds):
        if kind not in MIXERS:
            raise ValueError(f"layer {index} has kind {kind!r}, which has no Hugging Face form; known kinds: {', '.join(MIXERS)}")
    return [lookup(kind) for kind in kinds]
