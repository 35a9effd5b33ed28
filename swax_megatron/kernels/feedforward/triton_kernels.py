"""SwiGLU's gradients and its product in one pass. Float32 inside; offsets are int64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch

BLOCK, WARPS = 4096, 8


@triton.jit
def swiglu_gradients_and_product(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, product_ptr, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """silu'(x) = s (1 + x (1 - s)) with s the logistic function of x. GROUPS: size is a multiple of 16, said in groups of 16."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    left = tl.minimum(size - base, BLOCK).to(tl.int32)
    if GROUPS:
        real = lane // 16 < left // 16
    else:
        real = lane < left
    dy = tl.load(dy_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + base + lane, mask=real, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dgate_ptr + base + lane, (dy * up * (share * (1.0 + gate * (1.0 - share)))).to(dgate_ptr.dtype.element_ty), mask=real)
    tl.store(dup_ptr + base + lane, (dy * (gate * share)).to(dup_ptr.dtype.element_ty), mask=real)
    product = gate / (1.0 + tl.exp(-gate)) * up  # as in forward, to the bit
    tl.store(product_ptr + base + lane, product.to(product_ptr.dtype.element_ty), mask=real)


def gradients_and_product(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup and silu(gate) * up, contiguous in gate's shape."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, product = (torch.empty_like(gate) for _ in range(3))
    size = gate.numel()
    constants = {"GROUPS": size % 16 == 0, "BLOCK": BLOCK, "num_warps": WARPS}
    launch(swiglu_gradients_and_product, (triton.cdiv(size, BLOCK),), (dy, gate, up, dgate, dup, product), (size,), constants, (size,))
    return dgate, dup, product
