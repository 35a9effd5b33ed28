"""Triton kernels for RMSNorm. A row lies in registers: read once, computed with in float32, written once. Offsets are int64."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ROWS"])
def rms_norm(x_ptr, weight_ptr, y_ptr, scale_ptr, ROWS, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """y = x * scale * weight and scale = 1 / sqrt(mean(x^2) + eps), a row a program; all contiguous."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PADDED)
    real = lane < WIDTH
    x = tl.load(x_ptr + row * WIDTH + lane, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + lane, mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(y_ptr + row * WIDTH + lane, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=real)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["ROWS"])
def rms_norm_gradients(
    dy_ptr, beside_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, dweight_ptr, ROWS,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """dx (with BESIDE, plus the gradient of the stream beside the norm) of every so many rows, and their share of the weight's gradient."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, PADDED)
    real = lane < WIDTH
    weight = tl.load(weight_ptr + lane, mask=real, other=0.0).to(tl.float32)
    dweight = tl.zeros([PADDED], tl.float32)
    at, scale_at = program.to(tl.int64) * WIDTH + lane, scale_ptr + program
    for _ in range(program, ROWS, programs):
        dy = tl.load(dy_ptr + at, mask=real, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        scale = tl.load(scale_at)
        normed = x * scale
        dnormed = dy * weight
        dweight += dy * normed
        dx = scale * (dnormed - normed * (tl.sum(dnormed * normed, 0) / WIDTH))
        if BESIDE:
            dx += tl.load(beside_ptr + at, mask=real, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=real)
        at += programs.to(tl.int64) * WIDTH
        scale_at += programs
    tl.store(dweight_ptr + program.to(tl.int64) * WIDTH + lane, dweight, mask=real)
