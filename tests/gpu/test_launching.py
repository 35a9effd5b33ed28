"""Launches that skip Triton's JIT are those that it would have made: strides, alignment, flags, lengths after calls of another kind."""

from __future__ import annotations

import pytest
import torch

from swax_megatron.kernels import launching
from swax_megatron.kernels.mlstm import mlstm, mlstm_fused
from swax_megatron.kernels.swa import swa

from .test_kernels import error, gradients, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def moved(x: torch.Tensor, offset: int, pad: int) -> torch.Tensor:
    """The values of x at an address `offset` elements on, with `pad` elements between its rows."""
    *shape, d = x.shape
    room = torch.empty(offset + x.numel() // d * (d + pad), dtype=x.dtype, device=x.device)
    view = room[offset:].view(*shape, d + pad)[..., :d]
    view.copy_(x.detach())
    return view.requires_grad_()


@pytest.mark.parametrize("offset, pad", [(1, 0), (0, 1), (3, 8), (8, 24), (0, 16)])
def test_views_of_any_alignment_after_an_aligned_call(offset, pad):
    inputs = make_inputs(1, 300, 2, 64, 128, "mixed")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = gradients(mlstm(*wide), wide)
    first = gradients(mlstm(*inputs, backend="triton"), inputs)
    for one in (0, 1, 2, None):  # q, k or v alone, and all three
        views = [moved(x, offset, pad) if i < 3 and one in (i, None) else x for i, x in enumerate(inputs)]
        for _ in range(2):  # through the JIT, then directly
            found = gradients(mlstm(*views, backend="triton"), views)
            assert max(error(a, b) for a, b in zip(found, exact, strict=True)) < 1e-2
    again = gradients(mlstm(*inputs, backend="triton"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_direct_calls_repeat_the_first_and_take_new_lengths():
    inputs = make_inputs(2, 515, 3, 64, 128, "mixed")
    ogate, weight = torch.randn_like(inputs[2]).requires_grad_(), torch.rand(384, device="cuda").requires_grad_()
    leaves = [*inputs, ogate, weight]
    boundaries = torch.tensor([0, 100, 515, 1030], dtype=torch.int32, device="cuda")
    launching._known.clear()
    runs = [gradients(mlstm_fused(*leaves, cu_seqlens=c, backend="triton"), leaves) for c in (None, boundaries) * 3]
    for i, run in enumerate(runs):
        assert all(torch.equal(a, b) for a, b in zip(run, runs[i % 2], strict=True))
    assert launching._known and not torch.equal(runs[0][0], runs[1][0])
    for length in (1, 130, 515):  # the same strides but for the batch's, another number of chunks
        part = [x[:1, :length] for x in (*inputs, ogate)]
        whole = mlstm_fused(*[x[:1] for x in (*inputs, ogate)], weight, backend="triton")[:, :length]
        found = mlstm_fused(*part, weight, backend="triton")
        assert error(found, whole) < 2e-3


@pytest.mark.parametrize("window", [128, 600])
def test_attention_repeats_its_first_call_and_takes_any_view(window):
    """Directly after the JIT: the same results; other lengths; views that no tensor descriptor holds; documents at odd addresses."""

    def inputs(length):
        generator = torch.Generator("cuda").manual_seed(0)
        drawn = [torch.randn(2, length, n, 64, generator=generator, device="cuda") for n in (4, 2, 2)]
        return [x.bfloat16().requires_grad_() for x in drawn]

    launching._known.clear()
    exact = {}
    for length in (700, 640, 700, 333, 700):
        leaves = inputs(length)
        if length not in exact:
            wide = [x.detach().double().requires_grad_() for x in leaves]
            exact[length] = gradients(swa(*wide, window, backend="reference"), wide)
        for views in (leaves, [moved(x, 1, 8) for x in leaves], [leaves[0], moved(leaves[1], 8, 0), moved(leaves[2], 3, 1)]):
            found = gradients(swa(*views, window, backend="triton"), views)
            assert max(error(a, b) for a, b in zip(found, exact[length], strict=True)) < 4e-3
    assert launching._known
    boundaries = torch.tensor([0, 100, 515, 700, 1400], dtype=torch.int32, device="cuda")
    runs = [swa(*leaves, window, cu_seqlens=c, backend="triton") for c in (None, boundaries) * 2]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3]) and not torch.equal(runs[0], runs[1])


def test_launch_hooks_see_every_launch():
    from triton import knobs

    inputs, seen = [x.detach() for x in make_inputs(1, 64, 1, 64, 64, "mixed")], []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    with torch.no_grad():
        expected = mlstm(*inputs, backend="triton")
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            hooked = mlstm(*inputs, backend="triton")
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert "outputs" in seen and torch.equal(hooked, expected)
        count = len(seen)
        assert torch.equal(mlstm(*inputs, backend="triton"), expected) and len(seen) == count


@pytest.mark.parametrize("d_qk, d_v", [(64, 64), (64, 128), (128, 256), (256, 512)])
def test_overlapping_launches_see_what_was_written_before_them(d_qk, d_v):
    """Inputs overwritten in place right before every call, memory used again: always the bits of a call that waited."""
    first = [x.detach() for x in make_inputs(2, 2100, 3, d_qk, d_v, "mixed")]
    sets = [first, [x.flip(1).contiguous() for x in first]]
    cotangents = [torch.randn_like(first[2]) for _ in sets]
    buffers, dh = [torch.empty_like(x).requires_grad_() for x in first], torch.empty_like(cotangents[0])

    def run(i):
        with torch.no_grad():
            for x, y in zip((*buffers, dh), (*sets[i], cotangents[i]), strict=True):
                x.copy_(y)
        h = mlstm(*buffers, backend="triton")
        return [h.detach(), *torch.autograd.grad(h, buffers, dh)]

    expected = []
    for i in range(2):
        expected.append(run(i))
        torch.cuda.synchronize()
    for _ in range(30):
        for found, wanted in zip([run(0), run(1)], expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_captured_in_a_graph():
    inputs = [x.detach() for x in make_inputs(1, 300, 2, 64, 128, "mixed")]
    with torch.no_grad():
        expected = mlstm(*inputs, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h = mlstm(*inputs, backend="triton")
        h.zero_()
        graph.replay()
    assert torch.equal(h, expected)
