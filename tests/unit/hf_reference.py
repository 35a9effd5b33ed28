"""Small Hugging Face models with random weights, and an independent fp64 model written from the training formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.names import hf_names, layer_types

VOCAB = 97


def tiny(kinds="MSMS", **changes):
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(kinds),
        layer_types=layer_types(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        num_mlstm_heads=2,
        mlstm_qk_head_dim=6,
        mlstm_v_head_dim=10,
        mlstm_chunk_size=4,
    )
    torch.manual_seed(1)
    model = SwaxForCausalLM(SwaxConfig(**{**fields, **changes})).eval()
    randomise(model)
    return model


def randomise(model):
    """Every weight away from its initial value: zeros would hide a wrong name or a wrong order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-4.0, 4.0)
            elif "embed_tokens" in name:
                parameter.normal_()
            else:
                parameter.normal_(0.0, (0.5 if "lm_head" in name else 1.5) * parameter.shape[1] ** -0.5)


def tokens(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- an independent model in fp64


def mlstm_parallel(q_thk, k_thk, v_thv, igate_th, fgate_th):
    """The parallel form of one row, m of the recurrence from a scalar loop."""
    log_f_th = F.logsigmoid(fgate_th)
    total_th = log_f_th.cumsum(0)
    m_th, m_h = [], torch.zeros_like(igate_th[0])
    for log_f_h, igate_h in zip(log_f_th, igate_th, strict=True):
        m_h = torch.maximum(log_f_h + m_h, igate_h)
        m_th.append(m_h)
    m_th = torch.stack(m_th)
    exponent_tsh = total_th[:, None] - total_th[None] + igate_th[None] - m_th[:, None]
    causal = torch.ones(len(q_thk), len(q_thk), dtype=torch.bool).tril()
    p_tsh = torch.einsum("thk,shk->tsh", q_thk, k_thk) * q_thk.shape[-1] ** -0.5 * exponent_tsh.exp()
    p_tsh = torch.where(causal[..., None], p_tsh, 0.0)
    norm_th = torch.maximum(p_tsh.sum(1).abs(), (-m_th).exp()) + 1e-6
    return torch.einsum("tsh,shv->thv", p_tsh, v_thv) / norm_th[..., None]


def reference_logits(config, weights, kinds, ids):
    """Logits (t, vocab) of one row in fp64 from parameters under their training names."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def cap(x, limit):
        return limit * torch.tanh(x / limit)

    def rope(x_thd):
        length, _, size = x_thd.shape
        angle = torch.arange(length)[:, None] * config.rope_theta ** (-torch.arange(0, size, 2).double() / size)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        half = torch.complex(x_thd[..., : size // 2], x_thd[..., size // 2 :]) * turn
        return torch.cat((half.real, half.imag), -1)

    length = len(ids)
    x = weights["embedding.word_embeddings.weight"][ids]
    for index, kind in enumerate(kinds):
        layer = {n.removeprefix(f"decoder.layers.{index}."): w for n, w in weights.items() if n.startswith(f"decoder.layers.{index}.")}
        mixer = {n.removeprefix("self_attention."): w for n, w in layer.items() if n.startswith("self_attention.")}
        y = rms(x, layer["input_layernorm.weight"])
        if kind == "M":
            heads = config.num_mlstm_heads
            q, k, v = (
                (y @ mixer[f"{n}_proj.weight"].T).view(length, heads, -1) for n in "qkv"
            )
            igate, fgate = (cap(y @ mixer[f"{n}gate_proj.weight"].T + mixer[f"{n}gate_proj.bias"], config.gate_cap) for n in "if")
            h = mlstm_parallel(q, k, v, igate, fgate)
            h = F.layer_norm(h, h.shape[-1:], eps=config.norm_eps).flatten(1) * mixer["head_norm.weight"]
            h = torch.sigmoid(y @ mixer["ogate_proj.weight"].T) * h
        else:
            q, k, v = ((y @ mixer[f"{n}_proj.weight"].T).view(length, -1, config.head_dim) for n in "qkv")
            if layer_types(kind)[0] in config.rope_layer_types:
                q, k = rope(q), rope(k)
            groups = config.num_attention_heads // config.num_key_value_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            distance = torch.arange(length)[:, None] - torch.arange(length)[None]
            seen = (distance >= 0) & (distance < (config.sliding_window if kind == "S" else length))
            score = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config.head_dim)
            h = torch.einsum("hts,shd->thd", score.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)
        x = x + h @ mixer["out_proj.weight"].T
        y = rms(x, layer["pre_mlp_layernorm.weight"])
        x = x + (F.silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    x = rms(x, weights["decoder.final_layernorm.weight"])
    logits = x @ weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"]).T
    return logits if config.logit_cap is None else cap(logits, config.logit_cap)


def training_weights(model, kinds):
    state = model.state_dict()
    return {training: state[exported] for training, exported in hf_names(kinds, tied=model.config.tie_word_embeddings).items()}
