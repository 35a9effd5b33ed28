"""The kernels of RMSNorm, loss and update on a GPU, against float64 and torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swax_megatron.kernels import fp8
from swax_megatron.kernels.feedforward import GatedDown
from swax_megatron.kernels.losses import logit_gradients, logit_statistics
from swax_megatron.kernels.norm import rms_norm, rms_norm_beside
from swax_megatron.kernels.update import AdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rows", "columns", "real", "cap"), [(300, 32768, 32768, 30.0), (77, 50304, 50257, None), (1, 384, 300, 15.0)])
def test_loss(rows: int, columns: int, real: int, cap: float | None) -> None:
    random = torch.Generator("cuda").manual_seed(1)
    raw = (10 * torch.randn(rows, columns, device="cuda", generator=random)).bfloat16()
    targets = torch.randint(0, real, (rows,), device="cuda", generator=random)
    upstream = torch.randn(2, rows, device="cuda", generator=random)
    wide = raw.double().requires_grad_()
    logits = (cap * torch.tanh(wide / cap) if cap else wide)[:, :real]
    expected = torch.stack([logits.logsumexp(-1), logits.gather(1, targets[:, None])[:, 0]])
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), wide)
    found = torch.stack(logit_statistics(raw, targets, real, cap, backend="triton"))
    assert error(found, expected.detach()) < 1e-6
    assert error(logit_gradients(raw, targets, found[0], *upstream, real, cap, backend="triton"), gradient) < 3e-3


@pytest.mark.parametrize("shape", [(5, 3, 2048), (1001, 1, 4096), (7, 1, 192)])
@pytest.mark.parametrize("beside", [False, True])
def test_norm(shape: tuple[int, ...], beside: bool) -> None:
    random = torch.Generator("cuda").manual_seed(2)
    x, stream, upstream = (torch.randn(shape, device="cuda", generator=random).bfloat16() for _ in range(3))
    weight = torch.randn(shape[-1], device="cuda", generator=random).bfloat16()
    x.requires_grad_(), weight.requires_grad_()
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.nn.functional.rms_norm(wide_x, shape[-1:], wide_weight, 1e-5)
    normed = rms_norm_beside(x, weight, 1e-5, backend="triton") if beside else (rms_norm(x, weight, 1e-5, backend="triton"),)
    assert error(normed[-1].detach(), expected.detach()) < 3e-3
    outputs, gradients = ([*normed], [stream, upstream]) if beside else ([*normed], [upstream])
    found = torch.autograd.grad(outputs, (x, weight), gradients)
    wide = [wide_x * 1, expected] if beside else [expected]
    for mine, true in zip(found, torch.autograd.grad(wide, (wide_x, wide_weight), [g.double() for g in gradients]), strict=True):
        assert error(mine, true) < 4e-3


def test_feedforward() -> None:
    random = torch.Generator("cuda").manual_seed(7)
    gate, up = (torch.randn(300, 2, 5504, device="cuda", generator=random).bfloat16().requires_grad_() for _ in range(2))
    weight = (0.02 * torch.randn(256, 5504, device="cuda", generator=random)).bfloat16().requires_grad_()
    upstream = torch.randn(300, 2, 256, device="cuda", generator=random).bfloat16()
    wide = [tensor.detach().double().requires_grad_() for tensor in (gate, up, weight)]
    expected = (torch.nn.functional.silu(wide[0]) * wide[1]) @ wide[2].t()
    y = GatedDown.apply(gate, up, weight)
    assert error(y.detach(), expected.detach()) < 4e-3
    found = torch.autograd.grad(y, (gate, up, weight), upstream)
    for mine, true in zip(found, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert error(mine, true) < 5e-3


def test_update() -> None:
    random = torch.Generator("cuda").manual_seed(3)
    flat = torch.randn(4 + 50_000 + 3 * 4096, device="cuda", generator=random)  # the second tensor begins off the grid of 16 bytes
    starts = [slice(0, 4), slice(4, 50_004), slice(50_004, flat.numel())]
    expected = [torch.nn.Parameter(flat[part].clone()) for part in starts]
    decays = [0.1, 0.0, 0.3]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(expected, decays, strict=True)]
    true = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    masters, means, squares, weights = flat.clone(), torch.zeros_like(flat), torch.zeros_like(flat), flat.bfloat16()
    mine = AdamW([(masters[part], means[part], squares[part], weights[part]) for part in starts], decays)
    for step in range(1, 5):
        wide = step % 2 == 0
        gradients = [torch.randn(p.shape, device="cuda", generator=random).to(torch.float32 if wide else torch.bfloat16) for p in expected]
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = gradient.float() * 0.5
        true.step()
        mine.ready(gradients)
        mine(3e-3, (0.9, 0.95), 1e-8, step, 0.5)
    assert float((torch.cat([p.detach() for p in expected]) - masters).abs().max()) < 2e-6
    assert torch.equal(masters.bfloat16(), weights)


@pytest.mark.parametrize("kind", [fp8.FORWARD, fp8.BACKWARD])
@pytest.mark.parametrize(("rows", "widths"), [(400, (96, 256)), (1024, (128,)), (256, (128, 384, 256)), (4112, (16, 32, 48, 2048))])
def test_eight_bits(kind: torch.dtype, rows: int, widths: tuple[int, ...]) -> None:
    random = torch.Generator("cuda").manual_seed(4)
    pieces = [torch.randn(rows, width, device="cuda", generator=random).bfloat16() for width in widths]
    plain, turned, scale = fp8.shrink(pieces, kind)
    whole, limit = torch.cat(pieces, 1).float(), torch.finfo(kind).max
    expected = (whole * (limit / whole.abs().max())).to(kind)
    assert torch.equal(turned.view(torch.uint8), plain.t().contiguous().view(torch.uint8))
    assert float(scale) == pytest.approx(float(whole.abs().max()) / limit, rel=1e-6)
    assert (plain.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 1e-3  # a tie that falls the other way


def test_weights_in_eight_bits() -> None:
    """Brought along together after every change, with a scale of their own each."""
    random = torch.Generator("cuda").manual_seed(6)
    sizes = ((256, (128, 384)), (2048, (1024, 512, 48)))
    groups = [[torch.randn(rows, width, device="cuda", generator=random).bfloat16() for rows in heights] for width, heights in sizes]
    holders = [fp8.Weights() for _ in groups]
    for _ in range(3):
        fp8.Weights.changed()
        groups[1][0].mul_(3.0)
        for holder, weights in zip(holders, groups, strict=True):
            plain, turned, scale = holder.small(weights)
            whole = torch.cat(weights).float()
            assert torch.equal(turned.view(torch.uint8), plain.t().contiguous().view(torch.uint8))
            assert error(plain.float() * scale, whole.double()) < 0.04


def test_products_in_eight_bits() -> None:
    random = torch.Generator("cuda").manual_seed(5)
    x = torch.randn(8, 2, 256, device="cuda", generator=random).bfloat16().requires_grad_()
    weights = [(0.05 * torch.randn(rows, 256, device="cuda", generator=random)).bfloat16().requires_grad_() for rows in (128, 64)]
    upstream = [torch.randn(8, 2, rows, device="cuda", generator=random).bfloat16() for rows in (128, 64)]
    found = fp8.Products.apply(x, fp8.Weights(), *weights)
    gradients = torch.autograd.grad(found, (x, *weights), upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, *weights)]
    expected = [wide[0] @ weight.t() for weight in wide[1:]]
    for mine, true in zip(found, expected, strict=True):
        assert error(mine.detach(), true.detach()) < 0.05
    for mine, true in zip(gradients, torch.autograd.grad(expected, wide, [dy.double() for dy in upstream]), strict=True):
        assert error(mine, true) < 0.1
