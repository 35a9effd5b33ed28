"""Full causal attention: the attention mixer, whose window for an F layer is always the whole row."""

from __future__ import annotations

from swax_megatron.model.layers.swa.mixer import AttentionMixer


class FullAttentionMixer(AttentionMixer):
    """An AttentionMixer of kind F: WindowSchedule gives these layers the sequence length as their window."""

    kind = "F"
