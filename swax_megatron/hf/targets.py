"""What a checkpoint can be exported as: names, shapes and config.json of each form."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.modeling_swax import SwaxForCausalLM, SwaxPreTrainedModel
from swax_megatron.hf.names import EMBEDDING, LAYER_TYPES, OUTPUT, hf_names, layer_types
from swax_megatron.hf.xlstm import xlstm_config, xlstm_names
from swax_megatron.model.cost import padded_vocab_size
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import Config

_AUTO_MAP = {
    "AutoConfig": "configuration_swax.SwaxConfig",
    "AutoModel": "modeling_swax.SwaxModel",
    "AutoModelForCausalLM": "modeling_swax.SwaxForCausalLM",
}


@dataclass(frozen=True)
class Target:
    """A form of export. names: export name -> training name; config: (bos, eos, dtype) -> content of config.json."""

    kind: str
    names: dict[str, str]
    config: Callable[[int, int, str], dict[str, Any]]
    remote_code: bool  # whether the folder holds its own modelling code

    def keeps_fp32(self, name: str) -> bool:
        """Whether a tensor is stored in fp32 whatever the type of the export: the mLSTM gates."""
        training = self.names[name].split(".")
        return any(part in SwaxPreTrainedModel._keep_in_fp32_modules_strict for part in training)


def swax_target(config: Config) -> Target:
    """The project's own model, attention layers included."""
    names = hf_names(parse_pattern(config.model.pattern), tied=config.model.tie_embeddings)

    def content(bos: int, eos: int, dtype: str) -> dict[str, Any]:
        return _config_json(swax_config(config, bos=bos, eos=eos), dtype)

    return Target("swax", {exported: training for training, exported in names.items()}, content, True)


def xlstm_target(config: Config) -> Target:
    """transformers' xLSTMForCausalLM, for a pattern of mLSTM layers alone. ValueError for what has no form there.

    It has no tied embeddings: the head then is a copy of them.
    """
    xlstm_config(config, bos=1, eos=2)
    names = {exported: training for training, exported in xlstm_names(len(parse_pattern(config.model.pattern))).items()}
    if config.model.tie_embeddings:
        names = {exported: EMBEDDING if training == OUTPUT else training for exported, training in names.items()}

    def content(bos: int, eos: int, dtype: str) -> dict[str, Any]:
        exported: PreTrainedConfig = xlstm_config(config, bos=bos, eos=eos)
        head = {"architectures": ["xLSTMForCausalLM"], "model_type": exported.model_type, "dtype": dtype}
        return {**head, **{name: value for name, value in exported.to_dict().items() if name not in head}}

    return Target("xlstm", names, content, False)


TARGETS = {"swax": swax_target, "xlstm": xlstm_target}


def parameter_shapes(config: Config, *, padded: bool) -> dict[str, tuple[int, ...]]:
    """Training name -> global shape, in the order of the layers; ``padded``: with the padding rows of the vocabulary."""
    names = hf_names(parse_pattern(config.model.pattern), tied=config.model.tie_embeddings)
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in SwaxForCausalLM(swax_config(config, bos=1, eos=2)).named_parameters()}
    assert set(names.values()) == set(found), set(names.values()) ^ set(found)
    shapes = {training: found[name] for training, name in names.items()}
    if padded:
        shapes |= {name: (padded_vocab_size(config.model.vocab_size), *shapes[name][1:]) for name in (EMBEDDING, OUTPUT) if name in shapes}
    return shapes


def swax_config(config: Config, *, bos: int, eos: int) -> SwaxConfig:
    """The export's configuration: the test window becomes its sliding window, pad is EOS."""
    model = config.model
    kinds = parse_pattern(model.pattern)
    return SwaxConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=len(kinds),
        layer_types=layer_types(kinds),
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.attention_kv_heads,
        head_dim=model.attention_head_dim,
        sliding_window=config.window.test_window,
        rope_theta=model.rope_base,
        rope_layer_types=[LAYER_TYPES[kind] for kind in model.rope_kinds if kind in LAYER_TYPES and kind != "M"],
        num_mlstm_heads=model.mlstm_heads,
        mlstm_qk_head_dim=model.mlstm_qk_dim,
        mlstm_v_head_dim=model.mlstm_v_dim,
        gate_cap=model.gate_cap,
        logit_cap=model.logit_cap or None,
        norm_eps=model.norm_eps,
        initializer_range=model.init_std,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def _config_json(config: SwaxConfig, dtype: str) -> dict[str, Any]:
    """config.json with every field of SwaxConfig, also those at their defaults."""
    everything = config.to_dict()
    fields = [name for name in inspect.signature(SwaxConfig.__init__).parameters if name in everything]
    return {
        "architectures": [SwaxForCausalLM.__name__],
        "auto_map": _AUTO_MAP,
        "model_type": SwaxConfig.model_type,
        "dtype": dtype,
        **{name: everything[name] for name in fields},
        "number_of_conv_states": config.number_of_conv_states,
        "transformers_version": transformers.__version__,
    }
