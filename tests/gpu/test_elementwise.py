"""SwiGLU's activation, rotary positions and gate projections in Triton on a GPU, against float64: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swax_megatron.kernels.documents import log_once
from swax_megatron.kernels.elementwise import gate_projections, rotary, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROUNDING = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float32: 2e-6}  # relative RMS error of tensors rounded once


def draw(*shape, dtype=torch.bfloat16, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def run(function, leaves, dtype, **options):
    outputs = function(*leaves, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = [draw(*y.shape, dtype=dtype, seed=1).detach().to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def check(function, leaves, tolerance=None):
    """Within rounding of float64, the same bits again, and the same under recomputation."""
    dtype = leaves[0].dtype
    ours = run(function, leaves, dtype, backend="triton")
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = [error(a, b) for a, b in zip(ours, run(function, wide, dtype, backend="reference"), strict=True)]
    assert max(found) < (tolerance or ROUNDING[dtype]), found
    again = run(function, leaves, dtype, backend="triton")
    kept = run(lambda *x: checkpoint(lambda *y: function(*y, backend="triton"), *x, use_reentrant=False), leaves, dtype)
    for other in (again, kept):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    return ours


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1000, 1, 5504), (300, 2, 2752), (77, 3, 1376), (50, 1, 688), (33, 2, 999), (1, 1, 10240)])
def test_swiglu(dtype, shape):
    check(swiglu, [draw(*shape, dtype=dtype, scale=3.0, seed=seed) for seed in (2, 3)])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("d, heads, groups, last", [(128, 16, 16, 16_384), (128, 32, 8, 131_072), (64, 12, 1, 1_000_000), (96, 3, 3, 100)])
def test_rotary(dtype, d, heads, groups, last):
    q, k = (draw(700, 2, n, d, dtype=dtype).detach().transpose(0, 1).requires_grad_() for n in (heads, groups))
    positions = torch.randint(0, last, (2, 700), device="cuda")
    ours = check(lambda q, k, **options: rotary(q, k, positions, 10_000.0, **options), [q, k])
    assert ours[0].stride() == q.stride()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("width, heads, count", [(2048, 4, 16_384), (4096, 8, 5000), (2048, 1, 700), (1000, 32, 333), (64, 2, 1)])
def test_gate_projections(dtype, width, heads, count):
    """The gates themselves as exactly as float32 gives them, whatever the type of x; gradients within their tensors' rounding."""
    for parameters in {dtype, torch.float32}:
        shapes = ((heads, width), (heads,))
        leaves = [draw(count, 1, width, dtype=dtype), *(draw(*shapes[n % 2], dtype=parameters, seed=n) for n in range(4))]
        check(gate_projections, leaves, None if dtype != torch.float32 else 1e-5)
        exact = gate_projections(*[x.detach().double() for x in leaves])
        assert max(error(a, b) for a, b in zip(gate_projections(*leaves, backend="triton"), exact, strict=True)) < 5e-6


def test_auto_takes_triton_for_bfloat16_alone(caplog):
    caplog.set_level("INFO")
    log_once.cache_clear()
    swiglu(draw(3, 64), draw(3, 64))
    swiglu(draw(3, 64, dtype=torch.float32), draw(3, 64, dtype=torch.float32))
    assert "gates: Triton kernels" in caplog.text and "gates: plain torch" in caplog.text


def test_new_row_counts_compile_nothing():
    from triton.runtime.jit import JITFunction

    from swax_megatron.kernels.elementwise import triton_kernels

    kernels = [x for x in vars(triton_kernels).values() if isinstance(x, JITFunction)]

    def compiled_after(length, batch):
        swiglu(draw(length, batch, 688), draw(length, batch, 688, seed=1), backend="triton").sum().backward()
        q, k = (draw(length, batch, n, 64).transpose(0, 1) for n in (4, 2))
        sum(x.sum() for x in rotary(q, k, torch.zeros(batch, length, dtype=torch.int64, device="cuda"), 1e4, backend="triton")).backward()
        parameters = [draw(*shape, seed=n) for n in range(2) for shape in ((4, 256), (4,))]
        sum(x.sum() for x in gate_projections(draw(length, batch, 256), *parameters, backend="triton")).backward()
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    first = compiled_after(512, 2)
    assert first > 0 and [compiled_after(*size) for size in ((513, 2), (1, 1), (7, 3), (4096, 1))] == [first] * 4


def test_tensors_of_more_than_2_to_the_31_elements():
    """The last rows have the bits they have alone."""
    if torch.cuda.mem_get_info()[0] < 34 * 2**30:
        pytest.skip("needs 34 GiB of free GPU memory")
    rows, width = 2**31 // 5504 + 100, 5504
    gate, up, dy = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def values(part):
        leaves = [x[part].detach().requires_grad_() for x in (gate, up)]
        y = swiglu(*leaves, backend="triton")
        return [x[-50:].clone() for x in (y.detach(), *torch.autograd.grad(y, leaves, dy[part]))]

    whole, alone = values(slice(None)), values(slice(rows - 50, None))
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))
