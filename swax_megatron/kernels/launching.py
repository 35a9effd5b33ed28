"""Launching Triton and Gluon kernels with little Python.

`kernel[grid](...)` binds, classifies and hashes every argument at every launch: longer, on a slow host, than small kernels run. `Launches`
does that once for a kind of call: the first goes through Triton's JIT and keeps the compiled kernels, later ones of the same kind hand
addresses and numbers straight to them. A kind is all that Triton specialises on: the caller's own key (it decides every constant), and of
every tensor its dtype, its address modulo 16 and, where strides are among the arguments, these. Other numbers among the arguments must
be in the kernels' `do_not_specialize`. Under Triton's interpreter, with a Triton that this was not tested with, or while launch hooks
(profilers) are set, every launch goes through Triton.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .documents import TESTED_CAPABILITY

LIMIT = 1024  # kinds kept; more mean that lengths never repeat
ALIGNED = 32  # float32 numbers: regions of a buffer begin at multiples of 128 bytes

# how compiled kernels are called is Triton's own affair, and Gluon is experimental
TESTED = triton.__version__.startswith("3.6.") and os.environ.get("TRITON_INTERPRET") != "1"

_known: dict[tuple, list[tuple]] = {}


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels that can be are launched as dependents of the kernel before them (`dependent.py`): on Hopper."""
    return TESTED and device.type == "cuda" and torch.cuda.get_device_capability(device) == TESTED_CAPABILITY


class Blocks(NamedTuple):
    """A tensor read or written in blocks by the tensor memory accelerator: what a launch needs of a tensor descriptor."""

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block: tuple[int, ...]
    padding: str = "zero"


def padded(size: int) -> int:
    """Numbers that a region of `size` takes in a buffer."""
    return -(-size // ALIGNED) * ALIGNED


def _direct(compiled: Any, constants: int) -> tuple:
    """The call that launches a compiled kernel, and its arguments between the stream and the kernel's own, and after those.

    No launch hooks, and nothing for the constants, which are compiled in. What needs scratch memory goes through Triton's launcher.
    """
    run, hooks, after = compiled.run, (compiled.packed_metadata, None, None, None), (None,) * constants
    if run.global_scratch_size or run.profile_scratch_size:
        return run, (compiled.function, *hooks), after
    return run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *hooks), after


class Launches:
    """The launches of one call, in an order that its kind fixes; `finish` after the last.

    kind: the caller's key. tensors: those whose address and strides are among the arguments; addresses: those whose address alone is.
    Tensors that the caller allocates (aligned, dense, of a dtype that the kind fixes) need not be named. described: makes the kernel
    language's tensor descriptor of an argument that is `Blocks`.
    """

    __slots__ = ("_key", "_compiled", "_stream", "_next", "_described", "direct")

    def __init__(
        self,
        kind: tuple,
        tensors: Iterable[Tensor | None],
        addresses: Iterable[Tensor | None] = (),
        described: Callable[[Blocks], Any] | None = None,
    ) -> None:
        key: list[Any] = [kind]
        for x in tensors:
            if x is None:
                key.append(None)
            else:
                key += (x.dtype, x.stride(), x.data_ptr() & 15)
        for x in addresses:
            if x is None:
                key.append(None)
            else:
                key += (x.dtype, x.data_ptr() & 15)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        self._key = (device, *key)
        known = _known.get(self._key)
        self.direct = known is not None and not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)
        self._compiled: list = known if self.direct else []
        self._next = 0
        self._described = described
        self._stream = driver.active.get_current_stream(device) if self.direct else None

    def pointer(self, x: Tensor | None) -> Tensor | int | None:
        """What a launch takes for x: its address, or x itself where Triton is to look at it. The caller keeps x alive."""
        return x.data_ptr() if self.direct and x is not None else x

    def regions(self, buffer: Tensor, sizes: Sequence[int]) -> list[Tensor | int]:
        """What launches take for consecutive regions of a float32 buffer of sum(padded(size)) numbers."""
        found, at, base = [], 0, buffer.data_ptr()
        for size in sizes:
            found.append(base + 4 * at if self.direct else buffer[at : at + size])
            at += -(-size // ALIGNED) * ALIGNED
        return found

    def __call__(self, kernel: Any, grid: tuple[int, int, int], arguments: tuple, constants: dict[str, Any]) -> None:
        """Launch `kernel` with its run-time arguments in order; constants: the constexpr ones, which come last, and options."""
        if self.direct:
            run, before, after = self._compiled[self._next]
            self._next += 1
            run(*grid, self._stream, *before, *arguments, *after)
            return
        if self._described is not None:
            arguments = tuple(self._described(x) if isinstance(x, Blocks) else x for x in arguments)
        compiled = kernel[grid](*arguments, **constants)
        if TESTED:
            self._compiled.append(_direct(compiled, len(kernel.arg_names) - len(arguments)))

    def finish(self) -> None:
        """Keep what was compiled for later calls of this kind."""
        if not self.direct and self._compiled:
            if len(_known) >= LIMIT:
                _known.clear()
            _known[self._key] = self._compiled


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    numbers: tuple,
    constants: dict[str, Any],
    kind: tuple = (),
) -> None:
    """One launch by itself. Tensors come first among its arguments. kind: those of the numbers that Triton specialises on."""
    once = Launches((kernel, *constants.values(), *kind), tensors)
    once(kernel, (*grid, 1, 1)[:3], (*map(once.pointer, tensors), *numbers), constants)
    once.finish()
