"""The mLSTM reference: three forms of one function, with every gradient, documents, states and extreme gates.

Legend: b batch, t time, h heads, k = d_qk, v = d_v.
"""

import pytest
import torch

from swax_megatron.kernels.mlstm import MlstmState, mlstm, mlstm_chunkwise, mlstm_parallel, mlstm_recurrent, mlstm_step

# mean of the raw input gate, mean of the raw forget gate: denominator clamped, mixed, free; memory kept and lost
REGIMES = {
    "clamped": (-10.0, 4.0),
    "mixed": (-4.0, 4.0),
    "free": (5.0, 3.0),
    "high": (40.0, 2.0),
    "keep": (0.0, 60.0),
    "forget": (0.0, -60.0),
}


def make_inputs(batch=2, length=37, heads=2, d_qk=6, d_v=10, regime="mixed", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    i_mean, f_mean = REGIMES[regime]

    def draw(*shape, mean=0.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) + mean

    q, k = draw(batch, length, heads, d_qk), draw(batch, length, heads, d_qk)
    v = draw(batch, length, heads, d_v)
    gates = draw(batch, length, heads, mean=i_mean), draw(batch, length, heads, mean=f_mean)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype).requires_grad_() for x in (q, k, v)] + [x.to(gate_dtype).requires_grad_() for x in gates]


def make_state(batch=2, heads=2, d_qk=6, d_v=10, m=1.5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(batch, heads, d_qk, d_v, generator=generator, dtype=torch.float64).requires_grad_()
    n = torch.randn(batch, heads, d_qk, generator=generator, dtype=torch.float64).requires_grad_()
    return MlstmState(c, n, torch.full((batch, heads), m, dtype=torch.float64))


def gradients(function, inputs, state=None, *, with_final=True, **options):
    """[h, C, n, m, gradients...] of a fixed random cotangent on h and on the true final state (e^m C, e^m n at a common m)."""
    h, final = function(*inputs, initial_state=state, **options)
    generator = torch.Generator().manual_seed(9)
    loss = (h * torch.randn(h.shape, generator=generator, dtype=torch.float64)).sum()
    if with_final:
        for x in (final.c_bhkv, final.n_bhk):
            loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    leaves = list(inputs) + ([] if state is None else [state.c_bhkv, state.n_bhk])
    return [h.detach(), *(x.detach() for x in final), *torch.autograd.grad(loss, leaves)]


def assert_close(ours, theirs, tolerance=1e-10):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error < tolerance, f"result {index}: relative error {error:.2e}"


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("chunk_size", [1, 8, 16, 64])
def test_chunkwise_is_recurrent(regime, chunk_size):
    inputs, state = make_inputs(regime=regime), make_state()
    expected = gradients(mlstm_recurrent, inputs, state)
    assert_close(gradients(mlstm_chunkwise, inputs, state, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("regime", REGIMES)
def test_parallel_is_recurrent(regime):
    inputs = make_inputs(regime=regime)
    cu_seqlens = torch.tensor([0, 5, 37, 60, 61, 74], dtype=torch.int32)
    for cu in (None, cu_seqlens):
        h = mlstm_parallel(*inputs, cu_seqlens=cu)
        expected, _ = mlstm_recurrent(*inputs, cu_seqlens=cu)
        cotangent = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(3))
        ours, theirs = torch.autograd.grad(h, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
        assert_close([h.detach(), *ours], [expected.detach(), *theirs])


DOCUMENTS = [
    [0, 37, 74],
    [0, 1, 2, 3, 37, 38, 74],
    [0, 7, 8, 15, 16, 24, 32, 37, 40, 61, 73, 74],
    [0, 16, 16, 32, 37, 37, 45, 53, 74],  # boundaries on chunk ends, empty documents
]


@pytest.mark.parametrize("regime", ["clamped", "mixed", "free", "keep"])
@pytest.mark.parametrize("boundaries", DOCUMENTS)
def test_documents_are_run_alone(regime, boundaries):
    """Packed documents equal each document by itself, gradients too; the initial state reaches the first of each row alone."""
    inputs, state = make_inputs(regime=regime), make_state()
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    packed = gradients(mlstm_chunkwise, inputs, state, cu_seqlens=cu_seqlens, chunk_size=8)
    assert_close(packed, gradients(mlstm_recurrent, inputs, state, cu_seqlens=cu_seqlens))

    batch, length = inputs[0].shape[:2]
    h = packed[0]
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        if start == stop:
            continue
        row, begin, end = start // length, start % length, (stop - 1) % length + 1
        first = MlstmState(*(x[row : row + 1] for x in state)) if begin == 0 else None
        alone, _ = mlstm_recurrent(*(x[row : row + 1, begin:end] for x in inputs), initial_state=first)
        torch.testing.assert_close(h[row : row + 1, begin:end], alone, rtol=1e-10, atol=1e-13)


def test_nothing_leaks_across_documents():
    """Other tokens and gates in document one leave document two bit for bit the same, with all gates wide open."""
    inputs = [x.detach() for x in make_inputs(batch=1, regime="high")]
    inputs[4].fill_(100.0)
    cu_seqlens = torch.tensor([0, 13, 37], dtype=torch.int32)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :13] = torch.randn(x[:, :13].shape, dtype=x.dtype) * 5
    before, state_before = mlstm(*inputs, cu_seqlens=cu_seqlens, chunk_size=8, return_final_state=True)
    after, state_after = mlstm(*changed, cu_seqlens=cu_seqlens, chunk_size=8, return_final_state=True)
    assert not torch.equal(before[:, :13], after[:, :13])
    assert torch.equal(before[:, 13:], after[:, 13:])
    assert all(torch.equal(a, b) for a, b in zip(state_before, state_after, strict=True))


@pytest.mark.parametrize("regime", ["clamped", "free", "forget"])
def test_every_split_is_one_run(regime):
    inputs, state = make_inputs(length=19, regime=regime), make_state()
    whole = gradients(mlstm_chunkwise, inputs, state, chunk_size=4)

    def split_at(cut):
        def run(*tensors, initial_state):
            first, between = mlstm_chunkwise(*(x[:, :cut] for x in tensors), initial_state=initial_state, chunk_size=4)
            second, last = mlstm_chunkwise(*(x[:, cut:] for x in tensors), initial_state=between, chunk_size=4)
            return torch.cat([first, second], 1), last

        return run

    for cut in range(1, 19):
        assert_close(gradients(split_at(cut), inputs, state), whole)


def test_step_is_recurrent():
    inputs = [x.detach() for x in make_inputs(length=5)]
    expected, last = mlstm_recurrent(*inputs)
    state = MlstmState.empty(2, 2, 6, 10, dtype=torch.float64)
    places = [x.data_ptr() for x in state]
    for t in range(5):
        h, same = mlstm_step(*(x[:, t] for x in inputs), state)
        assert same is state and [x.data_ptr() for x in state] == places
        torch.testing.assert_close(h, expected[:, t])
    assert_close(state, last)


def test_steps_continue_a_sequence():
    """From the final state of a row, which is dense so that a step can overwrite it."""
    inputs = [x.detach() for x in make_inputs(length=9)]
    whole, last = mlstm(*inputs, return_final_state=True)
    _, state = mlstm(*(x[:, :7] for x in inputs), return_final_state=True, chunk_size=4)
    for t in (7, 8):
        torch.testing.assert_close(mlstm_step(*(x[:, t] for x in inputs), state)[0], whole[:, t])
    assert_close(state, last)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(q=a["q"][0]), "q must be a tensor of shape"),
        (lambda a: a.update(k=a["k"][:, :1]), "k must have q's shape"),
        (lambda a: a.update(v=a["v"].float()), "v has dtype"),
        (lambda a: a.update(igate=a["igate"].to("meta")), "igate is on meta"),
        (lambda a: a.update(fgate=a["fgate"].bfloat16()), "fgate has dtype"),
        (lambda a: a.update(state=None), "state must be an MlstmState"),
        (lambda a: a.update(state=a["state"]._replace(n_bhk=a["state"].n_bhk[..., :-1])), "state.n_bhk must be"),
        (lambda a: a.update(state=a["state"]._replace(m_bh=a["state"].m_bh.float())), "state.m_bh must be"),
        (lambda a: a.update(state=a["state"]._replace(c_bhkv=a["state"].c_bhkv.to("meta"))), "state.c_bhkv must be"),
        (lambda a: a.update(state=a["state"]._replace(c_bhkv=a["state"].c_bhkv.mT.contiguous().mT)), "state.c_bhkv must be contiguous"),
        (lambda a: a.update(state=a["state"]._replace(m_bh=a["state"].m_bh[:1].expand(2, 2))), "state.m_bh must be contiguous"),
        (lambda a: a.update(q=a["q"].requires_grad_()), "no gradient"),
        (lambda a: a["state"].n_bhk.requires_grad_(), "no gradient"),
    ],
)
def test_a_step_names_what_is_wrong_and_overwrites_nothing(change, message):
    inputs = [x.detach()[:, 0] for x in make_inputs(length=1)]
    state = MlstmState.empty(2, 2, 6, 10, dtype=torch.float64)
    arguments = dict(zip(("q", "k", "v", "igate", "fgate"), inputs, strict=True), state=state)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        mlstm_step(*arguments.values())
    assert all(not x.any() for x in state)


@pytest.mark.parametrize("regime", ["free", "keep"])
def test_gradient_without_the_normaliser_is_wrong(regime):
    """A mutant that drops the gradient of the denominator (delta) is far from ours: the tests above can see it."""
    q, k, v, i, f = inputs = make_inputs(batch=1, length=16, regime=regime)

    def mutant():
        d_k = q.shape[-1] ** -0.5
        lf = torch.nn.functional.logsigmoid(15 * torch.tanh(f / 15)).transpose(1, 2).cumsum(-1)
        ig = (15 * torch.tanh(i / 15)).transpose(1, 2)
        log_d = (lf[..., :, None] - lf[..., None, :] + ig[..., None, :]).masked_fill(~torch.ones(16, 16).bool().tril(), float("-inf"))
        m = torch.maximum(log_d.amax(-1), lf).detach()
        p = torch.einsum("bthk,bshk->bhts", q * d_k, k) * torch.exp(log_d - m[..., None])
        denominator = torch.maximum(p.sum(-1).abs(), torch.exp(-m)) + 1e-6
        return torch.einsum("bhts,bshv->bthv", p / denominator.detach()[..., None], v)

    h = mlstm_chunkwise(*inputs, chunk_size=8)[0]
    torch.testing.assert_close(mutant(), h)
    cotangent = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(4))
    ours, theirs = torch.autograd.grad(h, inputs, cotangent), torch.autograd.grad(mutant(), inputs, cotangent)
    for name, a, b in zip("qkvif", ours, theirs, strict=True):
        error = (a - b).norm() / a.norm()
        assert (error < 1e-10) if name == "v" else (error > 0.01), f"d{name}: {error:.2e}"


def test_long_sum_of_open_gates():
    """i~ = f~ = +15 (capped), constant k and v, 131,072 tokens in fp32 from bf16 inputs: finite, and right against fp64."""
    length = 131_072
    q = torch.full((1, length, 1, 2), 0.5, dtype=torch.bfloat16)
    v = torch.full((1, length, 1, 2), 3.0, dtype=torch.bfloat16)
    gates = torch.full((1, length, 1), 1000.0)
    h, state = mlstm(q, q, v, gates, gates, return_final_state=True, chunk_size=256)
    wide = [x.double() for x in (q, q, v, gates, gates)]
    expected, state_wide = mlstm(*wide, return_final_state=True, chunk_size=256)
    assert bool(torch.isfinite(h).all())
    torch.testing.assert_close(h.double(), expected, rtol=4e-3, atol=0)
    for a, b in zip(state, state_wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=0)


@pytest.mark.parametrize("regime", REGIMES)
def test_low_precision_inputs(regime):
    """fp32 agrees with fp64 to 1e-5 on the same values; bf16 inputs add only the rounding of the output (gates stay fp32)."""
    wide = make_inputs(length=150, regime=regime)
    # q and k around 1, not 0: a denominator that passes through zero would amplify any rounding, of the inputs to begin with
    rounded = [(x.detach() + shift).bfloat16() for x, shift in zip(wide[:3], (1, 1, 0), strict=True)]
    rounded += [x.detach().float() for x in wide[3:]]
    exact = [x.double().requires_grad_() for x in rounded]
    expected = gradients(mlstm_chunkwise, exact, with_final=False)
    ours = gradients(mlstm_chunkwise, [x.float().requires_grad_() for x in rounded], with_final=False)
    for index in (0, 4, 5, 6, 7, 8):
        # with every gate shut the gradients are differences of numbers far larger than themselves
        error = (ours[index] - expected[index]).norm() / expected[index].norm().clamp_min(1e-6)
        assert error < 1e-5, f"fp32 result {index}: {error:.2e}"
    h, _ = mlstm_chunkwise(*rounded)
    assert h.dtype == torch.bfloat16
    assert (h.double() - expected[0]).norm() / expected[0].norm() < 3e-3


def test_matches_hugging_face_xlstm():
    """An implementation by others: the native recurrence of transformers' xLSTM (no cap, gates already capped), in fp64."""
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    native = getattr(xlstm, "mlstm_recurrent_sequence_native", None)
    if native is None:
        pytest.skip("transformers defines its native xLSTM only when the package xlstm is absent")
    inputs = [x.detach() for x in make_inputs(regime="mixed")]
    q, k, v, i, f = (x.transpose(1, 2).contiguous() for x in inputs)
    expected = native(q, k, v, 15 * torch.tanh(i / 15), 15 * torch.tanh(f / 15), dtype_state=torch.float64, eps=1e-6)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(mlstm(*inputs), expected.transpose(1, 2), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(k=a["k"][:, :-1]), "k must have q's shape"),
        (lambda a: a.update(v=a["v"][:1]), "v must have shape"),
        (lambda a: a.update(v=a["v"].float()), "v has dtype"),
        (lambda a: a.update(igate=a["igate"][..., None]), "igate must have shape"),
        (lambda a: a.update(fgate=a["fgate"].bfloat16()), "fgate has dtype"),
        (lambda a: a.update(q=a["q"].long()), "q has dtype"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 37, 74])), "cu_seqlens must be an int32"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 40, 38, 74], dtype=torch.int32)), "must not decrease"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 37, 70], dtype=torch.int32)), "must start at 0 and end"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 40, 74], dtype=torch.int32)), "every row end"),
        (lambda a: a.update(initial_state=MlstmState.empty(1, 2, 6, 10, dtype=torch.float64)), "initial_state.c_bhkv"),
        (lambda a: a.update(initial_state=MlstmState.empty(2, 2, 6, 10)), "initial_state.c_bhkv"),
        (lambda a: a.update(gate_cap=0.0), "gate_cap"),
        (lambda a: a.update(chunk_size=0), "chunk_size"),
        (lambda a: a.update(backend="cuda"), "backend must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(zip(("q", "k", "v", "igate", "fgate"), make_inputs(), strict=True))
    change(arguments)
    positional = [arguments.pop(name) for name in ("q", "k", "v", "igate", "fgate")]
    with pytest.raises(ValueError, match=message):
        mlstm(*positional, **arguments)
