"""What every layer of a forward pass needs beside the hidden states: the window and the documents.

Megatron's TransformerBlock hands ``packed_seq_params`` through every layer, recomputation and pipeline stage. Our
subclass of it carries the window and the document boundaries as arguments: no global, nothing to set or to forget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class SequenceContext(PackedSeqParams):
    """The side information of one microbatch.

    windows: the attention window of every layer of the model (index = global layer, 0-based)
    cu_seqlens: (N+1,) int32, document boundaries over the flattened (B*T), row ends included
    positions_bt: (B, T) int64, position of every token inside its document
    """

    windows: tuple[int, ...] = ()
    cu_seqlens: Tensor | None = None
    positions_bt: Tensor | None = None

    def rotary(self, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles, (B, T, 1, head_dim / 2) fp32; angles are computed in fp32.

        RoPE (Su et al. 2021), theta_i = base^(-2i / head_dim).
        """
        positions_bt = self.positions_bt
        exponent = torch.arange(0, head_dim, 2, device=positions_bt.device, dtype=torch.float32) / head_dim
        angle_bt1d = positions_bt[:, :, None, None].float() * base**-exponent
        return angle_bt1d.cos(), angle_bt1d.sin()
