"""Sliding-window layers hold the parameters of full attention: the window is no parameter."""

from swax_megatron.model.layers.full.hf_names import HF_NAMES as HF_NAMES
