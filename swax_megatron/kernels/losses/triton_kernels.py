"""Triton kernels over rows of raw logits: one program a row, one pass forward, one pass backward in place.

Everything is float32 inside. Offsets are int64. The number of real columns is a run-time number.
"""

import triton
import triton.language as tl


@triton.jit
def _capped(raw, CAP: tl.constexpr):
    """cap * tanh(raw / cap), by way of exp; CAP 0: raw."""
    if CAP > 0:
        raw = CAP * (1.0 - 2.0 / (tl.exp(raw * (2.0 / CAP)) + 1.0))
    return raw


@triton.jit(do_not_specialize=["real"])
def logit_statistics(
    raw_ptr, targets_ptr, log_partition_ptr, chosen_ptr, stride, real,
    COLUMNS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-partition of a row's first `real` columns, and its target's logit (0 where the target is no column; padding counts as -inf)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        inside = start + lane < real
        raw = tl.load(raw_ptr + row * stride + start + lane, mask=start + lane < COLUMNS, other=0.0).to(tl.float32)
        logits = _capped(raw, CAP)
        logits = tl.where(inside, logits, float("-inf"))
        # a lane's own running maximum: nothing is reduced before the row's end
        higher = tl.maximum(largest, logits)
        total = total * tl.exp(tl.where(largest == higher, 0.0, largest - higher)) + tl.where(inside, tl.exp(logits - higher), 0.0)
        largest = higher
    top = tl.max(largest, 0)
    summed = tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top)), 0)
    tl.store(log_partition_ptr + row, tl.where(top == float("-inf"), top, top + tl.log(summed)))
    target = tl.load(targets_ptr + row)
    here = (target >= 0) & (target < COLUMNS)
    chosen = _capped(tl.load(raw_ptr + row * stride + target, mask=here, other=0.0).to(tl.float32), CAP)
    chosen = tl.where(target >= real, float("-inf"), chosen)
    tl.store(chosen_ptr + row, tl.where(here, chosen, 0.0))


@triton.jit(do_not_specialize=["real"])
def logit_gradients(
    raw_ptr, targets_ptr, log_partition_ptr, d_log_partition_ptr, d_chosen_ptr, stride, real,
    COLUMNS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's logits become their gradient: (probability * d log-partition + [target] * d chosen) * slope of the cap."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    log_partition = tl.load(log_partition_ptr + row)
    d_log_partition = tl.load(d_log_partition_ptr + row)
    d_chosen = tl.load(d_chosen_ptr + row)
    target = tl.load(targets_ptr + row)
    for start in range(0, COLUMNS, BLOCK):
        column = start + lane
        raw = tl.load(raw_ptr + row * stride + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        logits = _capped(raw, CAP)
        d_raw = tl.exp(logits - log_partition) * d_log_partition + tl.where(column == target, d_chosen, 0.0)
        if CAP > 0:
            d_raw *= 1.0 - (logits / CAP) * (logits / CAP)
        d_raw = tl.where(column < real, d_raw, 0.0)
        tl.store(raw_ptr + row * stride + column, d_raw.to(raw_ptr.dtype.element_ty), mask=column < COLUMNS)
