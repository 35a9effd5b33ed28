"""Sliding-window attention: the blocked reference against a dense mask, its gradients, documents and cost.

Legend: b batch, t time, h query heads, g key/value heads, d head size.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swax_megatron.kernels.swa import swa


def dense(q_bthd, k_btgd, v_btgd, window, boundaries=None):
    """The definition: a full T x T score matrix and a mask."""
    batch, length, heads, d = q_bthd.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k_btgd, v_btgd))
    scores = torch.einsum("bthd,bshd->bhts", q_bthd, k) * d**-0.5
    t = torch.arange(length)
    visible = (t[:, None] >= t) & (t[:, None] - t < window)
    visible = visible.expand(batch, length, length).clone()
    if boundaries is not None:
        document = torch.zeros(batch * length, dtype=torch.long)
        for boundary in boundaries[1:-1]:
            document[boundary:] += 1
        document = document.view(batch, length)
        visible &= document[:, :, None] == document[:, None, :]
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def make_inputs(batch=2, length=37, heads=4, kv_heads=2, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, d), (batch, length, kv_heads, d), (batch, length, kv_heads, d)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 31, 32, 33, 36, 37, 38, 1000])
@pytest.mark.parametrize("boundaries", [None, [0, 3, 20, 37, 38, 39, 70, 74]])
def test_is_dense_attention(window, boundaries):
    inputs = make_inputs()
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    assert_same(swa(*inputs, window, cu_seqlens=cu_seqlens), dense(*inputs, window, boundaries), inputs)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 15, 64, 100])
def test_heads_and_lengths(heads, kv_heads, length):
    inputs = make_inputs(length=length, heads=heads, kv_heads=kv_heads)
    assert_same(swa(*inputs, 24), dense(*inputs, 24), inputs)


@pytest.mark.parametrize("window", [1, 2, 8, 20, 21, 22, 37, 100])
@pytest.mark.parametrize("boundaries", [None, [0, 3, 20, 37, 38, 39, 70, 74]])
@pytest.mark.parametrize("queries", [1, 16, 30])
def test_the_last_queries_of_a_row_need_no_others(window, boundaries, queries):
    q, k, v = make_inputs()
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    ours = swa(q[:, -queries:], k, v, window, cu_seqlens=cu_seqlens)
    assert_same(ours, dense(q, k, v, window, boundaries)[:, -queries:], [q, k, v])


def test_documents_do_not_see_each_other():
    inputs = [x.detach() for x in make_inputs(batch=1)]
    cu_seqlens = torch.tensor([0, 13, 37], dtype=torch.int32)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :13] = torch.randn_like(x[:, :13])
    before, after = swa(*inputs, 20, cu_seqlens=cu_seqlens), swa(*changed, 20, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, 13:], after[:, 13:]) and not torch.equal(before[:, :13], after[:, :13])


def test_softmax_scale():
    inputs = make_inputs()
    scaled = [inputs[0] * (0.3 * 8**0.5), *inputs[1:]]
    assert_same(swa(*inputs, 9, softmax_scale=0.3), dense(*scaled, 9), inputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_low_precision_inputs_round_the_output_alone(dtype, tolerance):
    inputs = [x.detach() for x in make_inputs(length=100, dtype=dtype)]
    out = swa(*inputs, 40)
    expected = dense(*(x.double() for x in inputs), 40)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("window", [64, 100])
def test_cost_is_linear_in_length(window):
    """Matrix operations, forward and backward, counted (not timed): twice for twice the length, and near 1.5 windows a token."""

    def operations(length):
        inputs = make_inputs(batch=1, length=length, heads=2, kv_heads=1)
        with FlopCounterMode(display=False) as counter:
            swa(*inputs, window).sum().backward()
        return counter.get_total_flops()

    short, long = operations(1024), operations(2048)
    assert 1.9 < long / short < 2.1
    minimum = 3 * 2 * 2 * 2048 * window * 2 * 8  # forward + 2x backward, two products, multiply-add, T * w, heads * d
    assert long < 1.7 * minimum


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda q, k, v: (q, k, v, 0), "window must be"),
        (lambda q, k, v: (q, k, v, 8.0), "window must be"),
        (lambda q, k, v: (q, k, v, True), "window must be"),
        (lambda q, k, v: (q[..., :3, :], k, v, 8), "do not divide"),
        (lambda q, k, v: (q, k[:, 1:], v, 8), "k must have shape"),
        (lambda q, k, v: (q, k, v[:, :, :1], 8), "v must have k's shape"),
        (lambda q, k, v: (q, k.float(), v, 8), "k is torch.float32"),
        (lambda q, k, v: (q[0], k, v, 8), "q must be a tensor"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        swa(*arguments(*make_inputs()))


def test_wrong_documents_are_named():
    for boundaries, message in (([0, 40, 74], "every row end"), ([1, 37, 74], "must start at 0"), ([0, 37, 36, 74], "must not decrease")):
        with pytest.raises(ValueError, match=message):
            swa(*make_inputs(), 8, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32))


def test_a_scale_that_is_not_positive_is_refused():
    for scale in (0.0, -0.125, float("nan")):
        with pytest.raises(ValueError, match="softmax_scale must be > 0"):
            swa(*make_inputs(), 8, softmax_scale=scale)
