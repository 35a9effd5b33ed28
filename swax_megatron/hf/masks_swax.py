"""Which keys each layer type may see, in the form that the attention backend wants.

Shipped inside every export, so it imports torch and transformers alone.
"""

import dataclasses

import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

BAND_BLOCK = 512  # least number of queries that banded attention takes at once
# What transformers calls the cache in arguments and outputs: "cache" since 5.24, "past_key_values" before.
CACHE = "cache" if any(field.name == "cache" for field in dataclasses.fields(BaseModelOutputWithPast)) else "past_key_values"


def the_cache(cache, past_key_values):
    """The one that was given, under whichever name."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def band_block():
    return BAND_BLOCK


class LayerView:
    """A cache as the mask functions should see it: sized by one layer.

    Left to themselves they search the cache for a layer of the right kind, and transformers 5.17 takes an mLSTM layer
    for one of full attention.
    """

    def __init__(self, cache, layer_idx, is_sliding):
        self._cache, self._layer_idx, self.is_sliding = cache, layer_idx, [is_sliding]

    def get_query_offset(self, layer_idx=0):
        return self._cache.get_query_offset(self._layer_idx)

    def get_mask_sizes(self, query_length, layer_idx):
        return self._cache.get_mask_sizes(query_length, self._layer_idx)

    def __getattr__(self, name):
        return getattr(self._cache, name)


def can_band(config, length, attention_mask, cache):
    """Whether sliding attention runs in bands: long input, a backend that takes any mask, a cache that returns all keys."""
    return (
        "sliding_attention" in config.layer_types
        and config._attn_implementation in ("eager", "sdpa")
        and (cache is None or isinstance(cache, DynamicCache))
        and (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2))
        and length > max(config.sliding_window, BAND_BLOCK)
    )


def layer_masks(config, x_btm, attention_mask, cache, banded=False):
    """The mask of each layer type: the padding for mLSTM and banded layers, the backend's own form for the others.

    Rows are single documents, so the mask functions get no position ids: they would separate packed rows in attention,
    while the mLSTM memory runs on.
    """
    if isinstance(attention_mask, dict):  # made beforehand by generate() for a static cache
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2 and "linear_attention" in config.layer_types:
        raise ValueError(f"attention_mask must be (batch, tokens) for mLSTM layers, got {attention_mask.ndim} dimensions")
    masks = {}
    for layer_type in dict.fromkeys(config.layer_types):
        if layer_type == "linear_attention":
            # contiguous: strides that grow with the mask would have a compiled decoding step made anew
            masks[layer_type] = None if attention_mask is None else attention_mask[:, -x_btm.shape[1] :].contiguous()
        elif layer_type == "sliding_attention" and banded:
            masks[layer_type] = attention_mask
        else:
            sliding = layer_type == "sliding_attention"
            view = None if cache is None else LayerView(cache, config.layer_types.index(layer_type), sliding)
            create = create_sliding_window_causal_mask if sliding else create_causal_mask
            masks[layer_type] = create(config=config, inputs_embeds=x_btm, attention_mask=attention_mask, **{CACHE: view})
    return masks
