"""Triton kernels that bring matrices to 8 bits: the largest magnitude, and the scaled values either way up.

Up to four matrices side by side share a launch; all weights of a model share one by way of a table of addresses. Sizes are multiples of
16, and masks are said in groups of 16: the compiler then reads and writes whole groups at once. Offsets are int64.
"""

import triton
import triton.language as tl


@triton.jit
def _largest_of(x_ptr, size, block, largest_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    left = tl.minimum(size - block * BLOCK, BLOCK).to(tl.int32)
    x = tl.load(x_ptr + block * BLOCK + lane, mask=lane // 16 < left // 16, other=0.0).to(tl.float32)
    tl.atomic_max(largest_ptr, tl.max(tl.abs(x), 0))  # a maximum does not depend on the order in which programs come


@triton.jit
def largest(
    a_ptr, b_ptr, c_ptr, d_ptr, largest_ptr, rows, a_columns, b_columns, c_columns, d_columns,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The larger of what is there and max |x| over up to four dense matrices of as many rows."""
    block, piece, rows = tl.program_id(0).to(tl.int64), tl.program_id(1), rows.to(tl.int64)
    if piece == 0:
        if block * BLOCK < rows * a_columns:
            _largest_of(a_ptr, rows * a_columns, block, largest_ptr, BLOCK)
    if PIECES > 1:
        if piece == 1:
            if block * BLOCK < rows * b_columns:
                _largest_of(b_ptr, rows * b_columns, block, largest_ptr, BLOCK)
    if PIECES > 2:
        if piece == 2:
            if block * BLOCK < rows * c_columns:
                _largest_of(c_ptr, rows * c_columns, block, largest_ptr, BLOCK)
    if PIECES > 3:
        if piece == 3:
            if block * BLOCK < rows * d_columns:
                _largest_of(d_ptr, rows * d_columns, block, largest_ptr, BLOCK)


@triton.jit
def _scaled_tile(
    x_ptr, plain_ptr, turned_ptr, factor, rows, columns, stride_plain, stride_turned, r, c,
    TURNED: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Tile (r, c) of x (rows, columns, dense) times factor in 8 bits, as it is and turned."""
    row, column = r.to(tl.int64) * BR + tl.arange(0, BR), c.to(tl.int64) * BC + tl.arange(0, BC)
    at = x_ptr + row[:, None] * columns + column[None, :]
    plain_at = plain_ptr + row[:, None] * stride_plain + column[None, :]
    turned_at = turned_ptr + column[:, None] * stride_turned + row[None, :]
    if EVEN:
        small = (tl.load(at).to(tl.float32) * factor).to(KIND)
        tl.store(plain_at, small)
        if TURNED:
            tl.store(turned_at, tl.trans(small))
    else:
        row_real, column_real = row // 16 < rows // 16, column // 16 < columns // 16
        real = row_real[:, None] & column_real[None, :]
        small = (tl.load(at, mask=real, other=0.0).to(tl.float32) * factor).to(KIND)
        tl.store(plain_at, small, mask=real)
        if TURNED:
            tl.store(turned_at, tl.trans(small), mask=column_real[:, None] & row_real[None, :])


@triton.jit
def scaled(
    a_ptr, b_ptr, c_ptr, d_ptr, largest_ptr, plain_ptr, turned_ptr, inverse_ptr,
    rows, a_columns, b_columns, c_columns, d_columns, stride_plain, stride_turned,
    PIECES: tl.constexpr, LIMIT: tl.constexpr, TURNED: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Up to four matrices side by side times LIMIT / largest, in 8 bits: as they are and turned. inverse: what brings the result back."""
    largest = tl.maximum(tl.load(largest_ptr), 1e-30)
    factor = LIMIT / largest
    r, c, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if piece == 0:
        if c * BC < a_columns:
            _scaled_tile(
                a_ptr, plain_ptr, turned_ptr, factor, rows, a_columns, stride_plain, stride_turned, r, c, TURNED, KIND, EVEN, BR, BC
            )  # fmt: skip
        if (r == 0) & (c == 0):
            tl.store(inverse_ptr, largest / LIMIT)
    turned_stride = stride_turned.to(tl.int64)
    if PIECES > 1:
        if piece == 1:
            if c * BC < b_columns:
                _scaled_tile(
                    b_ptr, plain_ptr + a_columns, turned_ptr + a_columns * turned_stride, factor, rows, b_columns,
                    stride_plain, stride_turned, r, c, TURNED, KIND, EVEN, BR, BC,
                )  # fmt: skip
    if PIECES > 2:
        if piece == 2:
            done = a_columns + b_columns
            if c * BC < c_columns:
                _scaled_tile(
                    c_ptr, plain_ptr + done, turned_ptr + done * turned_stride, factor, rows, c_columns,
                    stride_plain, stride_turned, r, c, TURNED, KIND, EVEN, BR, BC,
                )  # fmt: skip
    if PIECES > 3:
        if piece == 3:
            done = a_columns + b_columns + c_columns
            if c * BC < d_columns:
                _scaled_tile(
                    d_ptr, plain_ptr + done, turned_ptr + done * turned_stride, factor, rows, d_columns,
                    stride_plain, stride_turned, r, c, TURNED, KIND, EVEN, BR, BC,
                )  # fmt: skip


@triton.jit
def _address(table_ptr, at, KIND: tl.constexpr):
    return tl.multiple_of(tl.load(table_ptr + at).to(tl.pointer_type(KIND)), 16)


@triton.jit
def largest_of_weights(table_ptr, blocks_ptr, largest_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """table: (weights, 7) address, rows, columns, slot, addresses as it is and turned, stride turned; blocks: (programs, 2) weight and
    block of it.
    """
    weight, block = tl.load(blocks_ptr + 2 * tl.program_id(0)), tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    size = tl.load(table_ptr + 7 * weight + 1) * tl.load(table_ptr + 7 * weight + 2)
    _largest_of(_address(table_ptr, 7 * weight, KIND), size, block, largest_ptr + 4 * tl.load(table_ptr + 7 * weight + 3), BLOCK)


@triton.jit
def scaled_weights(
    table_ptr, tiles_ptr, largest_ptr, inverse_ptr,
    LIMIT: tl.constexpr, KIND: tl.constexpr, SMALL: tl.constexpr, EVEN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Every weight of the table in 8 bits; tiles: (programs, 3) weight, row and column of the tile."""
    weight = tl.load(tiles_ptr + 3 * tl.program_id(0))
    r, c = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1), tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    entry = table_ptr + 7 * weight
    rows, columns, slot = tl.load(entry + 1), tl.multiple_of(tl.load(entry + 2), 16), tl.load(entry + 3)
    largest = tl.maximum(tl.load(largest_ptr + 4 * slot), 1e-30)
    _scaled_tile(
        _address(table_ptr, 7 * weight, KIND), _address(table_ptr, 7 * weight + 4, SMALL), _address(table_ptr, 7 * weight + 5, SMALL),
        LIMIT / largest, rows, columns, columns, tl.multiple_of(tl.load(entry + 6), 16), r, c, True, SMALL, EVEN, BR, BC,
    )  # fmt: skip
    if (r == 0) & (c == 0):
        tl.store(inverse_ptr + 4 * slot, largest / LIMIT)
