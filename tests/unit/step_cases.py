"""The kernels of norm, loss, update and 8 bits in Triton's CPU interpreter, on tiny shapes: `python -m tests.unit.step_cases`.

A process of its own, as `triton_cases.py` is, and for the same reason.
"""

from __future__ import annotations

import torch

from tests.unit.triton_cases import close  # first: it sets TRITON_INTERPRET

from swax_megatron.kernels import fp8  # isort: skip
from swax_megatron.kernels.feedforward import GatedDown  # isort: skip
from swax_megatron.kernels.losses import logit_gradients, logit_statistics  # isort: skip
from swax_megatron.kernels.norm import rms_norm, rms_norm_beside  # isort: skip
from swax_megatron.kernels.update import AdamW  # isort: skip


def run_losses() -> None:
    """Whole and padded vocabularies, targets of other ranks, a rank that holds padding alone, with and without cap."""
    random = torch.Generator().manual_seed(1)
    for columns, real, cap in ((300, 280, None), (4500, 4400, 15.0), (128, -3, 30.0)):
        raw = 6.0 * torch.randn(5, columns, generator=random)
        targets = torch.randint(0, max(real, 1), (5,), generator=random)
        targets[1], targets[2] = columns + 7, -4
        upstream = torch.randn(2, 5, generator=random)
        expected = logit_statistics(raw.double(), targets, real, cap, backend="reference")
        found = logit_statistics(raw, targets, real, cap, backend="triton")
        if real > 0:
            close("loss", found, expected, 1e-5)
        else:
            assert torch.equal(found[0], expected[0].float()), "a rank without real columns"
        partition = expected[0].float() if real > 0 else torch.randn(5, generator=random)
        given = (targets, partition, *upstream, real, cap)
        wide = logit_gradients(raw.double(), *given, backend="reference")
        ours = logit_gradients(raw.clone(), *given, backend="triton")
        close("gradient of the loss", [ours], [wide], 1e-5)


def run_norm() -> None:
    random = torch.Generator().manual_seed(2)
    for width in (64, 96):
        x = torch.randn(3, 4, width, generator=random).requires_grad_()
        weight = torch.randn(width, generator=random).requires_grad_()
        stream, upstream = torch.randn(2, 3, 4, width, generator=random)
        results = []
        for backend, tensors in (("triton", (x, weight)), ("reference", (x.detach().double(), weight.detach().double()))):
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            beside, normed = rms_norm_beside(*tensors, 1e-6, backend=backend)
            alone = rms_norm(*tensors, 1e-6, backend=backend)
            some = torch.autograd.grad([beside, normed], tensors, [stream.to(beside.dtype), upstream.to(beside.dtype)])
            more = torch.autograd.grad(alone, tensors, upstream.to(beside.dtype))
            results.append([normed, alone, *some, *more])
        close(f"norm of {width}", *results, 1e-5)


def run_feedforward() -> None:
    random = torch.Generator().manual_seed(5)
    for width in (40, 48):
        gate, up = (torch.randn(7, 3, width, generator=random).requires_grad_() for _ in range(2))
        weight, upstream = torch.randn(24, width, generator=random).requires_grad_(), torch.randn(7, 3, 24, generator=random)
        y = GatedDown.apply(gate, up, weight)
        wide = [tensor.detach().double().requires_grad_() for tensor in (gate, up, weight)]
        expected = (torch.nn.functional.silu(wide[0]) * wide[1]) @ wide[2].t()
        found = torch.autograd.grad(y, (gate, up, weight), upstream)
        close("feed-forward", [y, *found], [expected, *torch.autograd.grad(expected, wide, upstream.double())], 1e-5)


def run_update() -> None:
    """Tensors off the grid of 16 bytes and on it, gradients of either type, against torch's AdamW."""
    random = torch.Generator().manual_seed(3)
    flat = torch.randn(3 + 5000 + 5120, generator=random)
    parts = [slice(0, 3), slice(3, 5003), slice(5003, None)]
    decays = [0.1, 0.0, 0.05]
    expected = [torch.nn.Parameter(flat[part].clone()) for part in parts]
    groups = [{"params": [parameter], "weight_decay": decay} for parameter, decay in zip(expected, decays, strict=True)]
    theirs = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    masters, means, squares, weights = flat.clone(), torch.zeros_like(flat), torch.zeros_like(flat), flat.clone()
    ours = AdamW([(masters[part], means[part], squares[part], weights[part]) for part in parts], decays)
    for step in range(1, 4):
        gradients = [torch.randn(parameter.shape, generator=random) for parameter in expected]
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = 0.3 * gradient
        theirs.step()
        ours.ready(gradients)
        ours(3e-3, (0.9, 0.95), 1e-8, step, 0.3)
    close("update", [masters], [torch.cat([parameter.detach() for parameter in expected])], 1e-6)
    assert torch.equal(masters, weights)


def run_eight_bits() -> None:
    """Values, both ways up: matrices side by side, and weights one above the other, brought along together."""
    random = torch.Generator().manual_seed(4)
    for widths in ((32,), (48, 160), (16, 128, 32), (128, 128, 128, 256)):
        pieces = [torch.randn(48, width, generator=random) for width in widths]
        for kind in (fp8.FORWARD, fp8.BACKWARD):
            plain, turned, scale = fp8.shrink(pieces, kind)
            assert torch.equal(turned.float(), plain.float().t())
            close("8 bits", [plain.float() * scale], [torch.cat(pieces, 1)], 0.15)  # the interpreter rounds towards zero
    groups = [[torch.randn(rows, width, generator=random) for rows in heights] for width, heights in ((48, (16, 160)), (128, (256,)))]
    holders = [fp8.Weights() for _ in groups]
    for _ in range(3):
        fp8.Weights.changed()
        groups[0][0].mul_(2.0)
        for holder, weights in zip(holders, groups, strict=True):
            plain, turned, scale = holder.small(weights)
            assert torch.equal(turned.float(), plain.float().t())
            close("weights in 8 bits", [plain.float() * scale], [torch.cat(weights)], 0.15)


if __name__ == "__main__":
    run_losses()
    run_norm()
    run_feedforward()
    run_update()
    run_eight_bits()
    print("all cases agree")
