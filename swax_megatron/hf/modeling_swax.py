"""SWAX for transformers: mLSTM layers (xLSTM, arXiv:2405.04517) interleaved with sliding-window attention.

Shipped inside every export, so it imports torch and transformers alone.

Shapes: b batch, t time (queries), s time (keys), h heads, k query-key size and v value size of an mLSTM head,
d attention head size, m width of the residual stream. Every row is one document: positions count
from its first token that is not padding, and packed rows are not separated.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cell_swax import MASKED_GATE, mlstm_chunkwise, mlstm_step
from .configuration_swax import SwaxConfig
from .kernels_swax import fast_attention, fast_mlstm, kernel_plan
from .masks_swax import CACHE, band_block, can_band, layer_masks, the_cache

# -------------------------------------------------------------------------------------------------------------- cache


class SwaxRecurrentCache(DynamicCache):
    """The cache of a model without attention layers: transformers' own cannot tell such a model's length."""

    def __init__(self, config):
        super().__init__(config=config)
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx=0):
        return self.seen_tokens

    def reset(self):
        super().reset()
        self.seen_tokens = 0


def read_state(cache, layer_idx):
    """(C, n, m) of a layer in ``cache``; None where nothing has been seen yet."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not hasattr(layer, "recurrent_states") or layer.number_of_states != 3:
        raise ValueError("the cache has no place for mLSTM states: create it as DynamicCache(config=model.config)")
    if not layer.has_previous_state[0]:
        return None
    state = tuple(layer.recurrent_states[i] for i in range(3))
    # the cache overwrites its tensors: what the backward pass needs must not change under it
    return tuple(tensor.clone() for tensor in state) if torch.is_grad_enabled() else state


def write_state(cache, layer_idx, state):
    layer = cache.layers[layer_idx]
    for i, tensor in enumerate(state):
        cache.update_recurrent_state(tensor, layer_idx, state_idx=i)
        layer.has_previous_state[i] = True  # set by transformers for convolution states only
    layer.device, layer.dtype = state[0].device, state[0].dtype  # likewise; offloading and beam search read them


# ------------------------------------------------------------------------------------------------------------- layers


def linear(inputs, outputs, std=None):
    """A projection; ``std`` of its fresh weights (None: initializer_range)."""
    projection = nn.Linear(inputs, outputs, bias=False)
    if std is not None:
        projection.initial = (std, None)
    return projection


class SwaxGate(nn.Linear):
    """The pre-activation of a gate, one scalar a head, in fp32. Fresh weights are 0, the fresh bias runs from ``first`` to ``last``."""

    def __init__(self, inputs, heads, first, last):
        super().__init__(inputs, heads)
        self.initial = (0.0, (first, last))

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


def output_std(config):
    """Projections that add to the residual stream start smaller, by the square root of their number."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


class SwaxRMSNorm(nn.Module):
    """x / rms(x) * weight with fp32 statistics."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x_fp32 = x.float()
        scaled = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.float()).to(x.dtype)


class SwaxHeadLayerNorm(nn.Module):
    """LayerNorm of every head on its own (mean-subtracting, weight only), in fp32."""

    def __init__(self, num_heads, head_dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.eps = eps

    def forward(self, h_bthv):
        centred = h_bthv - h_bthv.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return scaled.flatten(-2) * self.weight.float()


class SwaxMLSTM(nn.Module):
    """The mLSTM mixer: exponential input gate, sigmoid forget gate, matrix memory; gates and state are fp32."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.qk_dim, self.v_dim = config.num_mlstm_heads, config.mlstm_qk_head_dim, config.mlstm_v_head_dim
        width, heads = config.hidden_size, self.num_heads
        self.q_proj = linear(width, heads * self.qk_dim)
        self.k_proj = linear(width, heads * self.qk_dim)
        self.v_proj = linear(width, heads * self.v_dim)
        self.ogate_proj = linear(width, heads * self.v_dim, std=0.0)
        self.igate_proj = SwaxGate(width, heads, -10.0, -10.0)
        self.fgate_proj = SwaxGate(width, heads, 3.0, 6.0)
        self.head_norm = SwaxHeadLayerNorm(heads, self.v_dim, config.norm_eps)
        self.out_proj = linear(heads * self.v_dim, width, std=output_std(config))

    def forward(self, x_btm, padding_mask_bt=None, cache=None, kernels=None):
        qkv = [projection(x_btm).unflatten(-1, (self.num_heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        with torch.autocast(device_type=x_btm.device.type, enabled=False):
            gates = self.igate_proj(x_btm), self.fgate_proj(x_btm)
            state = read_state(cache, self.layer_idx)
            if kernels is None:
                h_bthv, state = self._cell(*qkv, *gates, padding_mask_bt, state)
            else:
                h_bthv, state = fast_mlstm(*qkv, *gates, state, kernels, self.config, keep_state=cache is not None)
            if cache is not None:
                write_state(cache, self.layer_idx, state)
            normed = self.head_norm(h_bthv.float())
        gated = torch.sigmoid(self.ogate_proj(x_btm).float()) * normed
        return self.out_proj(gated.to(x_btm.dtype))

    def _cell(self, q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth, padding_mask_bt, state):
        """The cell in plain torch, fp32: h_bthv and the last (C, n, m)."""
        q_bhtk, k_bhtk, v_bhtv = (y.float().transpose(1, 2) for y in (q_bthk, k_bthk, v_bthv))
        q_bhtk = q_bhtk * self.qk_dim**-0.5
        cap = self.config.gate_cap
        igate_bht, fgate_bht = ((cap * torch.tanh(gate / cap)).transpose(1, 2) for gate in (igate_bth, fgate_bth))
        log_fgate_bht = F.logsigmoid(fgate_bht)
        if padding_mask_bt is not None:  # padding neither writes nor forgets
            padded_b1t = ~padding_mask_bt[:, None].bool()
            igate_bht = igate_bht.masked_fill(padded_b1t, MASKED_GATE)
            log_fgate_bht = log_fgate_bht.masked_fill(padded_b1t, 0.0)
        if state is None:
            shape = q_bhtk.shape[:2]
            sizes = ((self.qk_dim, self.v_dim), (self.qk_dim,), ())
            state = tuple(q_bhtk.new_zeros(*shape, *size) for size in sizes)
        if q_bhtk.shape[2] == 1:
            one = (q_bhtk[:, :, 0], k_bhtk[:, :, 0], v_bhtv[:, :, 0], igate_bht[..., 0], log_fgate_bht[..., 0])
            h_bhv, state = mlstm_step(*one, state, self.config.mlstm_eps)
            return h_bhv[:, None], state
        options = (self.config.mlstm_chunk_size, self.config.mlstm_eps)
        h_bhtv, state = mlstm_chunkwise(q_bhtk, k_bhtk, v_bhtv, igate_bht, log_fgate_bht, state, *options)
        return h_bhtv.transpose(1, 2), state


def rotary_tables(position_ids_bt, head_dim, base):
    """cos and sin (b, 1, t, d) of the rotate-half form (arXiv:2104.09864), angles in fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_bt.device) / head_dim
    angle = position_ids_bt[:, None, :, None].float() * base**-exponent
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_bhtd, tables):
    cos, sin = tables
    x_fp32 = x_bhtd.float()
    first, second = x_fp32.chunk(2, dim=-1)
    return (x_fp32 * cos + torch.cat((-second, first), dim=-1) * sin).to(x_bhtd.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling + mask) v with the weights in fp32; masks are boolean (True: seen) or additive."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if attention_mask is not None:
        hidden = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min) if attention_mask.dtype == torch.bool else None
        scores = scores + attention_mask if hidden is None else hidden
    weights = F.dropout(scores.softmax(-1).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class SwaxAttention(nn.Module):
    """Grouped-query attention, over the last ``sliding_window`` keys or over all."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        layer_type = config.layer_types[layer_idx]
        self.is_causal = True
        self.sliding = layer_type == "sliding_attention"
        self.use_rope = layer_type in config.rope_layer_types
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_width, key_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = linear(config.hidden_size, query_width)
        self.k_proj = linear(config.hidden_size, key_width)
        self.v_proj = linear(config.hidden_size, key_width)
        self.out_proj = linear(query_width, config.hidden_size, std=output_std(config))

    @property
    def sliding_window(self):
        """Read from the configuration at every call, as the masks are: it is free to change after loading. None: all keys."""
        return self.config.sliding_window if self.sliding else None

    def forward(self, x_btm, rotary, attention_mask=None, banded=False, cache=None, kernels=None):
        q, k, v = (
            projection(x_btm).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.use_rope:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.sliding_window}
        if banded and kernels is not None and k.shape[2] == q.shape[2]:
            o_bthd, weights = fast_attention(q, k, v, self.sliding_window, kernels), None
        elif banded:
            o_bthd, weights = self._banded(attend, q, k, v, attention_mask, options), None
        else:
            o_bthd, weights = attend(self, q, k, v, attention_mask, **options)
        return self.out_proj(o_bthd.flatten(-2)), weights

    def _banded(self, attend, q_bhtd, k_bhsd, v_bhsd, padding_mask_bs, options):
        """Sliding-window attention a block of queries at a time: no t x t mask, work and memory linear in t."""
        window, length, keys = self.sliding_window, q_bhtd.shape[2], k_bhsd.shape[2]
        block, past = max(window, band_block()), keys - length
        place_s = torch.arange(keys, device=q_bhtd.device)
        outputs = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            seen = slice(max(0, past + start - window + 1), past + stop)
            query_t1, key_1s = place_s[past + start : past + stop, None], place_s[None, seen]
            mask = ((key_1s <= query_t1) & (key_1s > query_t1 - window))[None, None]
            if padding_mask_bs is not None:  # padding still sees itself: a softmax over nothing is NaN
                mask = (mask & padding_mask_bs[:, None, None, -keys:].bool()[..., seen]) | (key_1s == query_t1)
            outputs.append(attend(self, q_bhtd[:, :, start:stop], k_bhsd[:, :, seen], v_bhsd[:, :, seen], mask, **options)[0])
        return torch.cat(outputs, dim=1)


class SwaxMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, std=output_std(config))

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SwaxDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.is_mlstm = config.layer_types[layer_idx] == "linear_attention"
        self.input_layernorm = SwaxRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = SwaxMLSTM(config, layer_idx) if self.is_mlstm else SwaxAttention(config, layer_idx)
        self.pre_mlp_layernorm = SwaxRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwaxMLP(config)

    def forward(self, hidden_states, attention_mask=None, banded=False, rotary=None, cache=None, kernels=None):
        normed = self.input_layernorm(hidden_states)
        if self.is_mlstm:
            mixed = self.mixer(normed, attention_mask, cache, kernels)
        else:
            mixed, _ = self.mixer(normed, rotary, attention_mask, banded, cache, kernels)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))


# ------------------------------------------------------------------------------------------------------------- models


class SwaxPreTrainedModel(PreTrainedModel):
    config_class = SwaxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwaxDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = ["igate_proj", "fgate_proj"]  # bf16 would move log f by up to 3 %
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be cropped back: no assisted generation
    _can_record_outputs = {"hidden_states": SwaxDecoderLayer, "attentions": SwaxAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and hasattr(module, "initial"):
            std, bias = module.initial
            init.normal_(module.weight, mean=0.0, std=std)
            if bias is not None:
                init.copy_(module.bias, torch.linspace(*bias, module.out_features))


class SwaxModel(SwaxPreTrainedModel):
    """The layers between the token embedding and the output head."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SwaxDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SwaxRMSNorm(config.hidden_size, config.norm_eps)
        self.has_attention = set(config.layer_types) != {"linear_attention"}
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        cache = the_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_btm = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config) if self.has_attention else SwaxRecurrentCache(self.config)
        banded = can_band(self.config, x_btm.shape[1], attention_mask, cache)
        masks = layer_masks(self.config, x_btm, attention_mask, cache, banded)
        kernels = kernel_plan(self.config, x_btm, attention_mask, cache)
        rotary = None
        if self.has_attention:
            if position_ids is None:
                past = cache.get_seq_length() if cache is not None else 0
                position_ids = (torch.arange(x_btm.shape[1], device=x_btm.device) + past)[None]
            rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            x_btm = layer(
                x_btm,
                attention_mask=masks[layer_type],
                banded=banded and layer_type == "sliding_attention",
                rotary=rotary,
                cache=cache,
                kernels=kernels,
            )
        if isinstance(cache, SwaxRecurrentCache):
            cache.seen_tokens += x_btm.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_btm), **{CACHE: cache})


class SwaxForCausalLM(SwaxPreTrainedModel, GenerationMixin):
    """SWAX with an output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = SwaxModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache: Cache | None = None,
        **kwargs,
    ):
        """Logits (b, t, vocab) in fp32, of the last ``logits_to_keep`` tokens (0: all; a tensor: these indices).

        ``cache`` and ``past_key_values`` are two names of one thing: transformers' before and after the change.
        With ``labels`` (b, t), the mean cross-entropy of predicting label t + 1 at token t; -100 is left out.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=the_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **{key: value for key, value in kwargs.items() if key in ("output_hidden_states", "output_attentions")},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep]).float()
        if self.config.logit_cap is not None:
            logits = self.config.logit_cap * torch.tanh(logits / self.config.logit_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, cache=None, **kwargs):
        """Called by generate() for static caches, whose masks are made outside the compiled forward pass."""
        return layer_masks(config, inputs_embeds, attention_mask, the_cache(cache, past_key_values))

    def generate(self, *args, **kwargs):
        given = the_cache(kwargs.get("cache"), kwargs.get("past_key_values"))
        if not self.model.has_attention and given is None and kwargs.get("use_cache", True):
            if kwargs.get("cache_implementation") is not None:
                raise ValueError("cache_implementation has no use without attention layers: the memory is constant (and static) by itself")
            kwargs.pop("past_key_values", None)
            kwargs[CACHE] = SwaxRecurrentCache(self.config)
        return super().generate(*args, **kwargs)
