"""A copy of a rank's fragments in host memory that is kept and used again: what a background save writes from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from swax_megatron.checkpoint.writer import Fragment

_ALIGNMENT = 64  # bytes: every view may be of any type
_SLAB = 256 << 20  # torch rounds pinned memory up to a power of two, so it is taken in pieces that are one


class Snapshot:
    """Host memory for one set of fragments. The first use allocates it, pinned where the fragments are on a GPU; later ones reuse it."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Host memory held, in bytes."""
        return sum(slab.numel() for slab in self._slabs)

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The same fragments over copies of their tensors, complete when this returns. From a GPU they go over a stream of their own."""
        fragments = list(fragments)
        on_gpu = next((fragment.tensor.device for fragment in fragments if fragment.tensor.is_cuda), None)
        if on_gpu is None:
            return self._copy(fragments, pinned=False)
        with torch.cuda.device(on_gpu), torch.cuda.stream(torch.cuda.Stream(on_gpu)):  # threads start with device 0
            copies = self._copy(fragments, pinned=True)
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, fragments: list[Fragment], *, pinned: bool) -> list[Fragment]:
        room = [_room(fragment.tensor) for fragment in fragments]
        left = sum(room)
        copies = []
        slab, used = 0, 0
        for fragment, size in zip(fragments, room, strict=True):
            while slab < len(self._slabs) and used + size > self._slabs[slab].numel():
                slab, used = slab + 1, 0
            if slab == len(self._slabs):
                self._slabs.append(torch.empty(max(size, min(_SLAB, left)), dtype=torch.uint8, pin_memory=pinned))
            source = fragment.tensor.detach()
            memory = self._slabs[slab][used : used + source.numel() * source.element_size()]
            copy = memory.view(source.dtype).view(source.shape)
            copy.copy_(source, non_blocking=True)
            copies.append(Fragment(fragment.key, fragment.global_shape, fragment.offsets, copy))
            used, left = used + size, left - size
        return copies


def _room(tensor: Tensor) -> int:
    """Bytes of a tensor, rounded up."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
