"""A tensor that exists only while it is written: how a program that holds no model writes a checkpoint of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Deferred:
    """Stands in a Fragment for a tensor of ``shape`` and ``dtype`` that ``read()`` gives when its turn to be written comes.

    It has what a save asks a tensor before that: shape, dtype, sizes. ``detach()``, with which writing begins, is the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def detach(self) -> Tensor:
        tensor = self.read()
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(self.shape), self.dtype), (tensor.shape, tensor.dtype, self)
        return tensor
