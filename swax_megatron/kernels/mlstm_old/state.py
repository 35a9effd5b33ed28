"""The memory of an mLSTM: what a sequence's past amounts to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MlstmState(NamedTuple):
    """Matrix memory, normaliser and stabiliser after some token: the true memory is e^m C, the true normaliser e^m n.

    c_bhkv (B, H, d_qk, d_v), n_bhk (B, H, d_qk), m_bh (B, H); float32 (float64 for float64 inputs). Gradients flow through
    c and n, never through m.
    """

    c_bhkv: Tensor
    n_bhk: Tensor
    m_bh: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, d_qk: int, d_v: int, *, device: torch.device | str = "cpu", dtype=torch.float32) -> MlstmState:
        """The state before a sequence: nothing stored, m = 0."""
        return cls(
            torch.zeros(batch, heads, d_qk, d_v, device=device, dtype=dtype),
            torch.zeros(batch, heads, d_qk, device=device, dtype=dtype),
            torch.zeros(batch, heads, device=device, dtype=dtype),
        )
