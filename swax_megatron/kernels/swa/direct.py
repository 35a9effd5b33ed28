"""Launch one of this folder's kernels again with little host time.

Triton's own launch inspects every argument and builds a key of strings before it finds the compiled kernel: longer, on a slow host,
than a narrow window's kernels run. The first launch of a kind goes that way and compiles; later ones go straight to the compiled
kernel. What Triton compiles for besides constants (types, alignment of pointers, divisibility and width of integers) is part of the
kind, or there is no kind and the launch goes Triton's way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# how compiled kernels are called is Triton's own affair
TESTED = triton.__version__.startswith("3.6.") and os.environ.get("TRITON_INTERPRET") != "1"
_compiled: dict[Hashable, tuple[Any, ...]] = {}


class Blocks(NamedTuple):
    """A tensor read or written in blocks by the tensor memory accelerator: what a launch needs of a tensor descriptor."""

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block: tuple[int, ...]
    padding: str = "zero"


def kind(*what: Hashable, tensors: Sequence[Tensor | None], strides: Sequence[int] = ()) -> Hashable | None:
    """What determines the compiled kernel: `what` (its name and constants), type, head size and device of the first tensor.

    tensors: those whose address the caller did not choose. None, so that nothing is remembered, unless all begin at 16 bytes and all
    strides are multiples of 16 below 2^31.
    """
    first = tensors[0]
    aligned = not any(x is not None and x.data_ptr() % 16 for x in tensors) and not any(n % 16 or n >= 2**31 for n in strides)
    return (*what, first.dtype, first.shape[-1], first.device.index) if TESTED and first.is_cuda and aligned else None


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    kind: Hashable | None,
    described: Callable[[Blocks], Any] | None = None,
) -> None:
    """Run `kernel` on the current stream. args: all that come before the constants, in order. constants: the rest, and the options.

    described: makes the kernel language's tensor descriptor of an argument that is `Blocks`.
    """
    found = None if kind is None else _compiled.get(kind)
    if found is None:
        compiled = kernel[grid](*(described(x) if isinstance(x, Blocks) else x for x in args), **constants)
        if kind is not None:
            blanks = (None,) * (len(kernel.arg_names) - len(args))  # constants are compiled in
            _compiled[kind] = compiled.run, compiled.function, compiled.packed_metadata, blanks
        return
    run, function, metadata, blanks = found
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    run(*grid, stream, function, metadata, None, None, None, *args, *blanks)
