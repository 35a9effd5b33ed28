"""Programmatic dependent launch, on Hopper: a kernel's programs come to the multiprocessors while the last ones of the kernel before run.

A kernel launched with `launch_pdl` may begin as soon as every program of the kernel before it in the stream has called `release` or has
ended. `wait` returns when that kernel has ended and its writes are seen. The rules:
- A kernel calls `wait` before it reads what the kernel before it writes, and before it writes what that one may still read or write
  (memory that torch's allocator hands out again included). Nearly all begin with `join`, which is `wait`, then `release`.
- A kernel that waits later says why it may. It is enough that what it does before is independent of the one kernel before it: that one
  has called `join`, so that everything earlier had ended when it let this kernel begin.
- Every program of every kernel waits before it ends. So a kernel that has ended has outlived all before it, and to wait for one is to
  wait for all.
- A kernel launched without `launch_pdl`, as torch's are, begins when everything before it in the stream has ended, and needs nothing here.

PDL is a constant of every kernel: False on other GPUs and in Triton's interpreter, which has no such instructions.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel's programs may come once all of this one's have called this."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernel before, and so every kernel before, has ended."""
    if PDL:
        gdc_wait()


@triton.jit
def join(PDL: tl.constexpr):
    """What nearly every kernel begins with."""
    wait(PDL)
    release(PDL)
