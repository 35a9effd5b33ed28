"""What every layer of a forward pass needs beside the hidden states: the window and the documents.

Megatron's TransformerBlock hands ``packed_seq_params`` through every layer, recomputation and pipeline stage. Our
subclass of it carries the window and the document boundaries as arguments: no global, nothing to set or to forget.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from swax_megatron.data.packing import Batch
from swax_megatron.parallel.context_exchange.ranks import ContextRanks


@dataclass(frozen=True)
class Piece:
    """This rank's part of every row of a microbatch under context parallelism.

    ranks: who holds the other parts
    row_cu_seqlens: (N+1,) int32, document boundaries over the flattened whole rows (B * P * L)
    length: L, tokens of a row here
    """

    ranks: ContextRanks
    row_cu_seqlens: Tensor
    length: int
    _made: dict[int, Tensor] = field(default_factory=dict)

    def boundaries(self, past: int = 0) -> Tensor:
        """(N+1,) int32: the boundaries over the flattened (B, past + L), for this piece and the ``past`` tokens before it.

        Boundaries outside are moved to the edges, where they bound empty documents: no value is looked at, so the GPU is not
        waited for.
        """
        if past not in self._made:
            row = self.length * self.ranks.size
            here = past + self.length
            number = torch.div(self.row_cu_seqlens, row, rounding_mode="floor")
            offset = self.row_cu_seqlens - number * row - (self.ranks.rank * self.length - past)
            self._made[past] = (number * here + offset.clamp(0, here)).to(torch.int32)
        return self._made[past]


@dataclass
class SequenceContext(PackedSeqParams):
    """The side information of one microbatch.

    windows: the attention window of every layer of the model (index = global layer, 0-based)
    cu_seqlens: (N+1,) int32, document boundaries over the flattened (B*T), row ends included
    positions_bt: (B, T) int64, position of every token inside its document
    piece: under context parallelism, which part of the rows the (B, T) tokens are; None: the whole rows
    """

    windows: tuple[int, ...] = ()
    cu_seqlens: Tensor | None = None
    positions_bt: Tensor | None = None
    piece: Piece | None = None

    @property
    def continues_b(self) -> Tensor:
        """(B,) bool: whether the first token continues a document that began in an earlier piece of its row."""
        return self.positions_bt[:, 0] > 0

    @property
    def last_start_b(self) -> Tensor:
        """(B,) int64: the index here of the first token of the last token's document; negative: in an earlier piece."""
        return self.positions_bt.shape[1] - 1 - self.positions_bt[:, -1]


def cut_rows(batch: Batch, ranks: ContextRanks | None) -> Batch:
    """This rank's piece of every row. The document boundaries stay those of the whole rows (see ``sequence_context``).

    Targets were shifted before the cut: the last token of a piece has the first of the next one as its target.
    """
    if ranks is None:
        return batch
    length = batch.inputs_bt.shape[1] // ranks.size
    names = ("inputs_bt", "targets_bt", "loss_mask_bt", "positions_bt")
    return replace(batch, **{name: getattr(batch, name).narrow(1, ranks.rank * length, length).contiguous() for name in names})


def sequence_context(batch: Batch, windows: tuple[int, ...], ranks: ContextRanks | None) -> SequenceContext:
    """What the layers need to know of a microbatch of ``cut_rows``."""
    if ranks is None:
        return SequenceContext(windows=windows, cu_seqlens=batch.cu_seqlens, positions_bt=batch.positions_bt)
    piece = Piece(ranks, batch.cu_seqlens, batch.inputs_bt.shape[1])
    return SequenceContext(windows=windows, cu_seqlens=piece.boundaries(), positions_bt=batch.positions_bt, piece=piece)
