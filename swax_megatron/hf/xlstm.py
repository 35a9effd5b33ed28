"""A pure-mLSTM model as transformers' own xLSTM (``xLSTMForCausalLM``, the layout of xLSTM-7B): names, configuration, limits.

Source of the layout and of every formula compared here: ``transformers/models/xlstm/modeling_xlstm.py``. Cell, soft caps,
norms and the place of every epsilon are the same; what differs is said where it matters (docs/huggingface.md).
"""

from __future__ import annotations

from typing import Any

from transformers import xLSTMConfig

from swax_megatron.hf.names import EMBEDDING, OUTPUT
from swax_megatron.hf.taken import Source, Taken, need
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import Config, ModelConfig

CELL_EPS = 1e-6  # the epsilon of our mLSTM cell
_ROUND = 64  # to which transformers' recurrent cache rounds the widths of queries and values

_LAYER = {
    "input_layernorm.weight": "norm_mlstm.weight",
    "self_attention.q_proj.weight": "mlstm_layer.q.weight",
    "self_attention.k_proj.weight": "mlstm_layer.k.weight",
    "self_attention.v_proj.weight": "mlstm_layer.v.weight",
    "self_attention.ogate_proj.weight": "mlstm_layer.ogate_preact.weight",
    "self_attention.igate_proj.weight": "mlstm_layer.igate_preact.weight",
    "self_attention.igate_proj.bias": "mlstm_layer.igate_preact.bias",
    "self_attention.fgate_proj.weight": "mlstm_layer.fgate_preact.weight",
    "self_attention.fgate_proj.bias": "mlstm_layer.fgate_preact.bias",
    "self_attention.head_norm.weight": "mlstm_layer.multihead_norm.weight",
    "self_attention.out_proj.weight": "mlstm_layer.out_proj.weight",
    "pre_mlp_layernorm.weight": "norm_ffn.weight",
    "mlp.gate_proj.weight": "ffn.proj_up_gate.weight",
    "mlp.up_proj.weight": "ffn.proj_up.weight",
    "mlp.down_proj.weight": "ffn.proj_down.weight",
}


def xlstm_names(layers: int) -> dict[str, str]:
    """Training name -> name in xLSTMForCausalLM, head included."""
    names = {EMBEDDING: "backbone.embeddings.weight"}
    for index in range(layers):
        names |= {f"decoder.layers.{index}.{ours}": f"backbone.blocks.{index}.{theirs}" for ours, theirs in _LAYER.items()}
    return names | {"decoder.final_layernorm.weight": "backbone.out_norm.weight", OUTPUT: "lm_head.weight"}


def xlstm_config(config: Config, *, bos: int, eos: int) -> xLSTMConfig:
    """transformers' configuration of the same model. ValueError, naming every reason, where it has no form there."""
    model = config.model
    kinds = parse_pattern(model.pattern)
    queries, values = model.mlstm_heads * model.mlstm_qk_dim, model.mlstm_heads * model.mlstm_v_dim
    problems = []
    if set(kinds) != {"M"}:
        problems.append(f"model.pattern={model.pattern!r} holds attention layers, and xLSTM has mLSTM layers alone")
    if not model.logit_cap:
        problems.append("model.logit_cap=null: xLSTM always caps its logits")
    for name, width in (("mlstm_qk_dim", queries), ("mlstm_v_dim", values)):
        if width % _ROUND:
            problems.append(f"model.mlstm_heads x model.{name} = {width} is no multiple of {_ROUND}, to which xLSTM's cache rounds it")
    if problems:
        raise ValueError(f"no export as xLSTM: {'; '.join(problems)}; export it as swax")
    result = xLSTMConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=len(kinds),
        num_heads=model.mlstm_heads,
        norm_eps=model.norm_eps,
        eps=CELL_EPS,
        qk_dim_factor=_factor(queries, model.hidden_size),
        v_dim_factor=_factor(values, model.hidden_size),
        ffn_proj_factor=_factor(model.ffn_hidden_size, model.hidden_size),
        ffn_round_up_to_multiple_of=1,
        gate_soft_cap=model.gate_cap,
        output_logit_soft_cap=model.logit_cap,
        autocast_kernel_dtype="float32",
        inference_state_dtype="float32",
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    assert (result.qk_dim, result.v_dim, _ffn(result)) == (queries, values, model.ffn_hidden_size), result
    return result


def _factor(width: int, hidden: int) -> float:
    """A float f with int(hidden * f) == width: transformers computes widths that way."""
    factor = width / hidden
    return factor if int(hidden * factor) == width else (width + 0.5) / hidden


def _ffn(config: xLSTMConfig) -> int:
    multiple = config.ffn_round_up_to_multiple_of
    return int(((config.hidden_size * config.ffn_proj_factor + multiple - 1) // multiple) * multiple)


def xlstm_source(raw: dict[str, Any]) -> Source:
    """How an xLSTMForCausalLM folder becomes a training checkpoint. ``raw``: its config.json."""
    what = "this xLSTM"
    need(raw, {"use_bias": False, "norm_reduction_force_float32": True, "add_out_norm": True, "tie_word_embeddings": False}, what)
    need(raw, {"eps": CELL_EPS, "add_qk_norm": False}, what)
    if raw.get("num_blocks") is not None:  # the layout's first name of it
        raw = {"num_hidden_layers": raw["num_blocks"], **raw}
    if raw.get("embedding_dim") is not None:
        raw = {"hidden_size": raw["embedding_dim"], **raw}
    config = xLSTMConfig(**raw)
    queries, values, ffn = int(config.hidden_size * config.qk_dim_factor), int(config.hidden_size * config.v_dim_factor), _ffn(config)
    for name, width in (("qk_dim_factor", queries), ("v_dim_factor", values)):
        if width % config.num_heads:
            raise ValueError(f"{what} cannot be imported: {name} gives {width} channels for num_heads={config.num_heads}")
    layers, heads = config.num_hidden_layers, config.num_heads
    fixed = {
        "pattern": f"Mx{layers}",
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": ffn,
        "vocab_size": config.vocab_size,
        "mlstm_heads": heads,
        "mlstm_qk_dim": queries // heads,
        "mlstm_v_dim": values // heads,
        "gate_cap": config.gate_soft_cap,
        "norm_eps": config.norm_eps,
        "logit_cap": config.output_logit_soft_cap,
        "tie_embeddings": False,
    }

    def plan(kinds: str, model: ModelConfig) -> dict[str, Taken]:
        taken = {ours: Taken(theirs) for ours, theirs in xlstm_names(layers).items()}
        if config.weight_mode == "fused":
            cuts = {"q_proj": (0, queries), "k_proj": (queries, 2 * queries), "v_proj": (2 * queries, 2 * queries + values)}
            cuts["ogate_proj"] = (2 * queries + values, 2 * (queries + values))
            for index in range(layers):
                layer, block = f"decoder.layers.{index}", f"backbone.blocks.{index}"
                for name, rows in cuts.items():
                    taken[f"{layer}.self_attention.{name}.weight"] = Taken(f"{block}.mlstm_layer.qkv_opreact.weight", *rows)
                for name, rows in {"igate_proj": (0, heads), "fgate_proj": (heads, 2 * heads)}.items():
                    for part in ("weight", "bias"):
                        taken[f"{layer}.self_attention.{name}.{part}"] = Taken(f"{block}.mlstm_layer.ifgate_preact.{part}", *rows)
                for name, rows in {"gate_proj": (0, ffn), "up_proj": (ffn, 2 * ffn)}.items():
                    taken[f"{layer}.mlp.{name}.weight"] = Taken(f"{block}.ffn.proj_up_gate_z.weight", *rows)
        return taken

    return Source("xlstm", fixed, {}, plan)
