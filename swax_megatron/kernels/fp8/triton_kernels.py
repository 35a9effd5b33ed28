"""Triton kernels that bring matrices to 8 bits: the largest magnitude, and the scaled values either way up. Offsets are int64."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["SIZE"])
def largest(x_ptr, largest_ptr, SIZE, BLOCK: tl.constexpr):
    """The larger of what is there and max |x|, x dense. A maximum does not depend on the order in which programs come."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.atomic_max(largest_ptr, tl.max(tl.abs(x), 0))


@triton.jit(do_not_specialize=["ROWS"])
def scaled(
    x_ptr, largest_ptr, plain_ptr, turned_ptr, inverse_ptr, ROWS, stride_plain, stride_turned,
    COLUMNS: tl.constexpr, LIMIT: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr, KIND: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x (ROWS, COLUMNS, dense) times LIMIT / largest, in 8 bits: as it is and turned. inverse: what brings the result back."""
    largest = tl.maximum(tl.load(largest_ptr), 1e-30)
    row, column = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.program_id(1) * BC + tl.arange(0, BC)
    real = (row < ROWS)[:, None]
    if COLUMNS % BC != 0:
        real = real & (column < COLUMNS)[None, :]
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :], mask=real, other=0.0).to(tl.float32)
    small = (x * (LIMIT / largest)).to(KIND)
    if PLAIN:
        tl.store(plain_ptr + row[:, None] * stride_plain + column[None, :], small, mask=real)
    if TURNED:
        turned_at = turned_ptr + column.to(tl.int64)[:, None] * stride_turned + row[None, :]
        tl.store(turned_at, tl.trans(small), mask=tl.trans(real & (column < COLUMNS)[None, :]))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_ptr, largest / LIMIT)
