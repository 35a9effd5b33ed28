"""The Triton kernels on a GPU, in bfloat16, against float64: outputs and every gradient, by relative RMS error.

Yardstick for the mLSTM: the parallel form in float64 with the matrices that a kernel must round (P, dS, h, dq, dk, dv) rounded to
bfloat16. A kernel may err twice as much as that. Legend: b batch, t time, h heads, k = d_qk, v = d_v.
"""

from __future__ import annotations

import pytest
import torch

from swax_megatron.kernels.mlstm import MlstmState, mlstm, mlstm_fused, mlstm_step
from swax_megatron.kernels.swa import swa, swa_blocked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPES = [(64, 64), (64, 128), (128, 256), (256, 512)]
# mean input and forget gate: denominator clamped, at the edge, free, and gates that forget or keep everything
REGIMES = {"clamped": (-10.0, 4.0), "mixed": (-4.0, 4.5), "free": (5.0, 3.0), "forget": (0.0, -15.0), "keep": (15.0, 15.0)}


class _Round(torch.autograd.Function):
    """Round to bfloat16 what goes forward and what comes back."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().to(gradient.dtype)


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().to(gradient.dtype)


def yardstick(q, k, v, igate, fgate):
    """One document a row, from nothing: the parallel form with rounded matrices."""
    q, k, v = (_RoundGradient.apply(x).transpose(1, 2) for x in (q, k, v))
    ig, lf = 15 * torch.tanh(igate / 15).transpose(1, 2), torch.nn.functional.logsigmoid(15 * torch.tanh(fgate / 15)).transpose(1, 2)
    length = q.shape[2]
    total = lf.cumsum(-1)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    logs = (total[..., :, None] - total[..., None, :] + ig[..., None, :]).masked_fill(~seen, float("-inf"))
    m = torch.maximum(logs.amax(-1), total).detach()
    p = _RoundGradient.apply(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 * torch.exp(logs - m[..., None])
    n = torch.maximum(p.sum(-1).abs(), torch.exp(-m)) + 1e-6
    return _Round.apply((_Round.apply(p) @ v) / n[..., None]).transpose(1, 2)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def make_inputs(batch, length, heads, d_qk, d_v, regime, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    i_mean, f_mean = REGIMES[regime]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k = ((draw(batch, length, heads, d_qk) + 0.5).to(dtype) for _ in range(2))  # denominators away from zero
    gates = draw(batch, length, heads) + i_mean, draw(batch, length, heads) + f_mean
    return [x.requires_grad_() for x in (q, k, draw(batch, length, heads, d_v).to(dtype), *gates)]


def gradients(h, leaves):
    cotangent = torch.randn(h.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(torch.bfloat16).to(h.dtype)
    return [h, *torch.autograd.grad(h, leaves, cotangent)]


@pytest.mark.parametrize("d_qk, d_v", SHAPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_mlstm_errs_at_most_twice_the_yardstick(d_qk, d_v, regime):
    inputs = make_inputs(1, 700, 2, d_qk, d_v, regime)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = gradients(mlstm(*wide), wide)
    rounded = gradients(yardstick(*wide), wide)
    ours = gradients(mlstm(*inputs, backend="triton"), inputs)
    found = {name: (error(a, e), error(r, e)) for name, a, r, e in zip("h dq dk dv di df".split(), ours, rounded, exact, strict=True)}
    # 1e-3: where the yardstick is exact (di of clamped gates) the kernels still round the states that chunks hand over
    assert all(a <= 2 * r + 1e-3 for a, r in found.values()), found


@pytest.mark.parametrize("d_qk, d_v", SHAPES)
def test_mlstm_documents_states_and_views(d_qk, d_v):
    """Packed documents, initial and final states with gradients, and inputs that are views with strides of their own."""
    inputs = make_inputs(2, 700, 2, d_qk, d_v, "mixed")
    inputs[0] = inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    cu_seqlens = torch.tensor([0, 5, 256, 300, 700, 700, 701, 1000, 1024, 1400], dtype=torch.int32, device="cuda")
    shapes = ((2, 2, d_qk, d_v), (2, 2, d_qk), (2, 2))
    state = MlstmState(*(torch.rand(s, device="cuda").requires_grad_(len(s) > 2) for s in shapes))

    def run(tensors, state, backend):
        h, end = mlstm(*tensors, cu_seqlens=cu_seqlens, initial_state=state, return_final_state=True, backend=backend)
        generator = torch.Generator("cuda").manual_seed(1)
        outputs = (h, end.c_bhkv, end.n_bhk)
        cotangents = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for x in outputs]
        loss = sum((x * d).double().sum() for x, d in zip(outputs, cotangents, strict=True))
        return [h, *end, *torch.autograd.grad(loss, [*tensors, state.c_bhkv, state.n_bhk])]

    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_state = MlstmState(*(x.detach().double().requires_grad_(x.requires_grad) for x in state))
    found = [error(a, b) for a, b in zip(run(inputs, state, "triton"), run(wide, wide_state, "reference"), strict=True)]
    assert max(found) < 8e-3, found


def test_mlstm_is_deterministic_and_new_sizes_compile_nothing():
    from triton.runtime.jit import JITFunction

    from swax_megatron.kernels.mlstm import triton_cell, triton_gates, triton_states

    kernels = [x for module in (triton_cell, triton_gates, triton_states) for x in vars(module).values() if isinstance(x, JITFunction)]

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    inputs = make_inputs(1, 1000, 2, 64, 128, "mixed")
    first, second = (gradients(mlstm(*inputs, backend="triton"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    before = compiled()
    for batch, length, heads in ((2, 333, 3), (1, 1, 4), (3, 2048, 5)):
        other = make_inputs(batch, length, heads, 64, 128, "mixed")
        gradients(mlstm(*other, backend="triton"), other)
    assert before > 0 and compiled() == before


def test_mlstm_float16_and_extreme_gates_stay_finite():
    for dtype, tolerance in ((torch.bfloat16, 6e-3), (torch.float16, 6e-3)):
        q, v = (torch.full((1, 131_072, 1, d), x, dtype=dtype, device="cuda") for d, x in ((64, 0.5), (64, 3.0)))
        gates = torch.full((1, 131_072, 1), 1000.0, device="cuda")
        h = mlstm(q, q, v, gates, gates, backend="triton")
        expected = mlstm(*(x.double() for x in (q, q, v, gates, gates)), chunk_size=256)
        assert bool(torch.isfinite(h).all()) and error(h, expected) < tolerance


def test_fused_layer():
    inputs = make_inputs(2, 300, 4, 64, 128, "mixed")
    ogate = torch.randn(2, 300, 4, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    leaves = [*inputs, ogate, torch.randn(512, device="cuda").requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours, exact = gradients(mlstm_fused(*leaves, backend="triton"), leaves), gradients(mlstm_fused(*wide), wide)
    found = [error(a, b) for a, b in zip(ours, exact, strict=True)]
    assert max(found) < 1e-2, found


@pytest.mark.parametrize("batch, heads, d_qk, d_v", [(3, 4, 256, 512), (1, 8, 128, 256), (40, 2, 64, 128), (2, 1, 64, 64)])
def test_decoding_steps_overwrite_the_state(batch, heads, d_qk, d_v):
    """Every program sees the old normaliser, from the first call (through the JIT) and later; nothing but h is allocated."""
    inputs = [x.detach() for x in make_inputs(batch, 6, heads, d_qk, d_v, "free")]
    state = MlstmState(*(torch.rand(s, device="cuda") for s in ((batch, heads, d_qk, d_v), (batch, heads, d_qk), (batch, heads))))
    exact = MlstmState(*(x.double() for x in state))
    places = [x.data_ptr() for x in state]
    with torch.no_grad():
        for t in range(6):
            token = [x[:, t] for x in inputs]
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            h, same = mlstm_step(*token, state, backend="triton")
            assert torch.cuda.max_memory_allocated() - before <= -(-h.nbytes // 512) * 512
            wide = [x.double() for x in token]
            h_exact, _ = mlstm_step(*wide, exact)
            assert error(h, h_exact) < 3e-3 and same is state and [x.data_ptr() for x in state] == places
            assert max(error(a, b) for a, b in zip(state, exact, strict=True)) < 2e-6


DOCUMENTS = [0, 5, 64, 700, 701, 900, 1400]


@pytest.fixture
def deterministic(request):
    """Deterministic algorithms on or off; on, torch also fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "window, heads, kv_heads, boundaries", [(128, 4, 1, None), (100, 6, 2, DOCUMENTS), (600, 4, 4, None), (650, 4, 2, DOCUMENTS)]
)
def test_swa(dtype, d, window, heads, kv_heads, boundaries, deterministic):
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(2, 700, n, d, generator=generator, device="cuda").to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours = gradients(swa(*inputs, window, cu_seqlens=cu_seqlens, backend="triton"), inputs)
    exact = gradients(swa_blocked(*wide, window, cu_seqlens=cu_seqlens), wide)
    found = [error(a, b) for a, b in zip(ours, exact, strict=True)]
    limit = 4e-3 if dtype == torch.bfloat16 else 6e-4
    assert max(found) < limit, found
    again = gradients(swa(*inputs, window, cu_seqlens=cu_seqlens, backend="triton"), inputs)
    same = [torch.equal(a, b) for a, b in zip(ours, again, strict=True)]
    assert all(same) if deterministic or window <= 512 else all(same[i] for i in (0, 2, 3)), same  # else dq's last bits may differ
    assert error(again[1], exact[1]) < limit


@pytest.mark.parametrize("deterministic", [False, True], indirect=True)
@pytest.mark.parametrize("window", [1, 2, 127, 513, 2000, 3001])
def test_swa_in_hard_regimes(window, deterministic):
    """Saturated and flat softmax, time first in memory, lengths that are no multiple of anything, windows up to the whole row."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = torch.rand(3001, 1, 1, 1, generator=generator, device="cuda") * 20  # from flat to one-hot rows
    shapes = [(3001, 2, n, 128) for n in (4, 2, 2)]
    inputs = [torch.randn(s, generator=generator, device="cuda") for s in shapes]
    inputs[0] = inputs[0] * size
    inputs = [x.bfloat16().transpose(0, 1).requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor([0, 1, 129, 3001, 3002, 5500, 6002], dtype=torch.int32, device="cuda")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for documents in (None, cu_seqlens):
        ours = gradients(swa(*inputs, window, cu_seqlens=documents, backend="triton"), inputs)
        exact = gradients(swa_blocked(*wide, window, cu_seqlens=documents), wide)
        # rounded relative to the largest: at window 1 the gradients of q and k are exactly zero, and ours rounding errors
        scale = max(float(x.norm() / x.numel() ** 0.5) for x in exact[1:])
        least = [max(float(b.detach().norm()), 1e-2 * scale * b.numel() ** 0.5) for b in exact]
        found = [float((a.detach().double() - b.detach()).norm()) / n for a, b, n in zip(ours, exact, least, strict=True)]
        assert max(found) < 8e-3, found


def test_swa_with_keys_before_the_queries():
    """A rank of context parallelism: the queries are the last of the row."""
    for window in (100, 1000):
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = [(2, n, heads, 128) for n, heads in ((300, 4), (1299, 2), (1299, 2))]
        inputs = [torch.randn(s, generator=generator, device="cuda").bfloat16().requires_grad_() for s in shapes]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        cu_seqlens = torch.tensor([0, 1100, 1299, 2400, 2598], dtype=torch.int32, device="cuda")
        for documents in (None, cu_seqlens):
            ours = gradients(swa(*inputs, window, cu_seqlens=documents, backend="triton"), inputs)
            exact = gradients(swa_blocked(*wide, window, cu_seqlens=documents), wide)
            found = [error(a, b) for a, b in zip(ours, exact, strict=True)]
            assert max(found) < 4e-3, (window, found)


@pytest.mark.parametrize("d", [64, 128])
def test_swa_where_gluon_is_untested(d, monkeypatch):
    """With another Triton than the one the Gluon kernels were tested with, Triton's own serve every window."""
    from swax_megatron.kernels import launching

    monkeypatch.setattr(launching, "TESTED", False)
    for window in (100, 600):
        generator = torch.Generator("cuda").manual_seed(0)
        inputs = [torch.randn(2, 700, n, d, generator=generator, device="cuda").bfloat16().requires_grad_() for n in (4, 2, 2)]
        cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32, device="cuda")
        wide = [x.detach().double().requires_grad_() for x in inputs]
        ours = gradients(swa(*inputs, window, cu_seqlens=cu_seqlens, backend="triton"), inputs)
        exact = gradients(swa_blocked(*wide, window, cu_seqlens=cu_seqlens), wide)
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < 4e-3


def test_swa_compiles_nothing_for_a_new_window():
    from triton.runtime.jit import JITFunction

    from swax_megatron.kernels.swa import gluon_dkv, gluon_dq, gluon_forward, gluon_onepass

    modules = (gluon_dkv, gluon_dq, gluon_forward, gluon_onepass)
    kernels = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}

    def run(length, window):
        inputs = [torch.randn(1, length, n, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (4, 1, 1)]
        swa(*inputs, window, backend="triton").sum().backward()
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    before = run(2048, 128), run(2048, 1024)
    assert before[0] > 0 and run(777, 17) == run(2048, 1555) == run(1000, 512) == before[1]


def test_fused_layer_takes_an_initial_state_and_the_gates_layout():
    """Two rows with time first in memory, as a layer's projections come; packed documents; the state's gradient."""
    inputs = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in make_inputs(2, 300, 4, 128, 256, "mixed")]
    ogate = torch.randn(300, 2, 4, 256, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    state = [torch.rand(s, device="cuda") for s in ((2, 4, 128, 256), (2, 4, 128))]
    leaves = [x.requires_grad_() for x in (*inputs, ogate, torch.rand(1024, device="cuda"), *state)]
    m, cu_seqlens = torch.rand(2, 4, device="cuda"), torch.tensor([0, 200, 300, 600], dtype=torch.int32, device="cuda")

    def run(tensors, backend):
        *given, c, n = tensors
        memory = MlstmState(c, n, m.to(c.dtype))
        # norm_eps: else the norm undoes the denominator, and nothing but rounding is left of the gradient of n
        return gradients(mlstm_fused(*given, cu_seqlens=cu_seqlens, initial_state=memory, norm_eps=0.5, backend=backend), tensors)

    ours, exact = run(leaves, "triton"), run([x.detach().double().requires_grad_() for x in leaves], "reference")
    found = [f"{error(a, b):.1e}" for a, b in zip(ours, exact, strict=True)]
    # the state's gradients are sums over products of bf16 factors of either sign, and cancel: twice the bound
    bound = [1e-2 if a.dtype == torch.bfloat16 else 2e-2 for a in ours]
    assert all(float(a) < b for a, b in zip(found, bound, strict=True)), found
    assert ours[0].stride() == ogate.stride() and all(torch.equal(a, b) for a, b in zip(ours, run(leaves, "triton"), strict=True))
