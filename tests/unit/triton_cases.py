"""Triton kernels under Triton's CPU interpreter, in float32 on tiny shapes: `python -m tests.unit.triton_cases mlstm|swa|elementwise`.

A process of its own (see test_mlstm_triton.py, test_swa_triton.py, test_elementwise.py): TRITON_INTERPRET is read when a kernel is
defined and would otherwise stay on for every later test. The interpreter shows wrong indexing, masks and mathematics; what a compiler
or a GPU can get wrong is for tests/gpu.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch.library import opcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from swax_megatron.kernels.documents import document_bounds  # noqa: E402
from swax_megatron.kernels.elementwise import gate_projections, rotary, swiglu  # noqa: E402
from swax_megatron.kernels.elementwise import triton_launch as elementwise_launch  # noqa: E402
from swax_megatron.kernels.elementwise.triton_op import gates_op, rotary_op, swiglu_op  # noqa: E402
from swax_megatron.kernels.mlstm import MlstmState, mlstm, mlstm_fused, mlstm_step, triton_launch  # noqa: E402
from swax_megatron.kernels.mlstm.triton_op import mlstm_fused_op, mlstm_op, mlstm_step_op  # noqa: E402
from swax_megatron.kernels.swa import swa, swa_blocked  # noqa: E402
from swax_megatron.kernels.swa import triton_launch as swa_launch  # noqa: E402
from swax_megatron.kernels.swa.triton_op import swa_op  # noqa: E402

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope) -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor


def close(name: str, ours, theirs, tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert bool(torch.isfinite(a).all()), f"{name}, result {index}: not finite"
        error = float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-12))
        assert error < tolerance, f"{name}, result {index}: relative error {error:.1e}"


def tiny_mlstm(chunk: int, block: int, keep: bool = True, scores: bool = False) -> triton_launch.Config:
    """Tiles of 16: several programs, chunks, blocks and pipeline steps in a few dozen tokens."""
    tile, wide = triton_launch.Tile, {"BM": block, "BN": 16, "BS": 16, "BD": 16}
    updates, depth = {"BK": 16, "BV": 16, "BT": 16, "GROUP": 2}, {"BT": block, "BD": 16}
    each = [tile(sizes, 4, 2) for sizes in (wide, updates, depth, wide, {"BLOCK": 64}, {"BLOCK": 64})]
    return triton_launch.Config(chunk, tile(depth, 4, 2) if scores else None, *each, keep)


def mlstm_inputs(batch, length, heads, d_qk, d_v, i_mean, f_mean):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, mean=0.0):
        return torch.randn(*shape, generator=generator) + mean

    # q and k around 1: no denominator near zero. Strides as in a layer: heads before time in memory for q, a slice for v.
    q = draw(batch, heads, length, d_qk, mean=1.0).transpose(1, 2)
    k = draw(batch, length, heads, d_qk, mean=1.0)
    v = draw(batch, length, heads, 2 * d_v)[..., d_v:]
    return [q, k, v, draw(batch, length, heads, mean=i_mean), draw(batch, length, heads, mean=f_mean)]


def check_mlstm(name, inputs, boundaries, with_states, config, tolerance=2e-5):
    """Forward and all gradients of the launches against the float64 reference."""
    q, k, v, i, f = inputs
    batch, length, heads, d_qk = q.shape
    d_v = v.shape[-1]
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    state, wide_state = (None,) * 3, None
    if with_states:
        generator = torch.Generator().manual_seed(1)
        shapes = ((batch, heads, d_qk, d_v), (batch, heads, d_qk), (batch, heads))
        state = tuple(torch.rand(shape, generator=generator) for shape in shapes)
        wide_state = MlstmState(*(x.double().requires_grad_() for x in state))
    start = None if cu_seqlens is None else document_bounds(cu_seqlens, batch, length)[0]
    triton_launch.CONFIGS[d_qk, d_v] = config
    h, *end, saved = triton_launch.forward(q, k, v, i, f, start, *state, with_states, 15.0, 1e-6, config)

    wide = [x.double().requires_grad_() for x in inputs]
    expected, final = mlstm(*wide, cu_seqlens=cu_seqlens, initial_state=wide_state, return_final_state=True, backend="reference")
    generator = torch.Generator().manual_seed(2)
    dh = torch.randn(h.shape, generator=generator)
    loss, d_end, leaves = (expected * dh).sum(), (None, None), list(wide)
    if with_states:
        d_end = [torch.randn(x.shape, generator=generator) for x in end[:2]]
        loss = loss + (final.c_bhkv * d_end[0]).sum() + (final.n_bhk * d_end[1]).sum()
        leaves += [wide_state.c_bhkv, wide_state.n_bhk]
        close(f"{name} final state", end, final, tolerance)
    ours = triton_launch.backward(q, k, v, i, f, start, h, dh, None, *d_end, saved, with_states, 15.0, 1e-6, config)
    close(name, (h, *ours[: len(leaves)]), (expected, *torch.autograd.grad(loss, leaves)), tolerance)


def run_mlstm() -> None:
    check_mlstm("one short chunk", mlstm_inputs(1, 11, 1, 16, 16, 0.0, 3.0), None, False, tiny_mlstm(32, 16))
    check_mlstm("two blocks a chunk", mlstm_inputs(1, 70, 2, 16, 32, -10.0, 3.0), None, True, tiny_mlstm(32, 16))
    check_mlstm("P again", mlstm_inputs(1, 70, 2, 32, 32, -10.0, 3.0), None, True, tiny_mlstm(32, 16, keep=False))
    documents = [0, 5, 32, 70, 70, 71, 72, 140]
    check_mlstm("documents, P again", mlstm_inputs(2, 70, 1, 16, 32, 0.0, 2.0), documents, True, tiny_mlstm(32, 16, keep=False))
    check_mlstm("documents, P first", mlstm_inputs(2, 70, 1, 16, 32, 0.0, 2.0), documents, True, tiny_mlstm(32, 16, scores=True))
    check_mlstm("documents", mlstm_inputs(2, 70, 1, 16, 32, 0.0, 2.0), documents, True, tiny_mlstm(32, 16))
    check_mlstm("documents, one block", mlstm_inputs(2, 70, 1, 16, 16, 5.0, 40.0), documents, True, tiny_mlstm(16, 16), 1e-4)
    # closed gates: the gradient of f~ is e^-15 of what it is the difference of
    check_mlstm("closed gates", mlstm_inputs(1, 40, 1, 16, 16, 0.0, -60.0), None, False, tiny_mlstm(32, 16), 2e-3)
    run_mlstm_operators()


def run_mlstm_operators() -> None:
    """The dispatch, the operators' autograd, the fused layer and the decoding step, with the shipped tiles of (64, 64)."""
    inputs = [x.requires_grad_() for x in mlstm_inputs(1, 20, 1, 64, 64, 0.0, 3.0)]
    generator = torch.Generator().manual_seed(3)
    ogate = torch.randn(1, 20, 1, 64, generator=generator).requires_grad_()
    weight = torch.rand(64, generator=generator).requires_grad_()
    leaves = [*inputs, ogate, weight]
    y, expected = (mlstm_fused(*leaves, backend=backend) for backend in ("triton", "reference"))
    cotangent = torch.randn(y.shape, generator=generator)
    close("fused", torch.autograd.grad(y, leaves, cotangent, retain_graph=True), torch.autograd.grad(expected, leaves, cotangent), 1e-4)
    h, end = mlstm(*inputs, return_final_state=True, backend="triton")
    h_expected, end_expected = mlstm(*inputs, return_final_state=True, backend="reference")
    ours, theirs = (torch.autograd.grad(x.sum() + s.c_bhkv.sum(), inputs) for x, s in ((h, end), (h_expected, end_expected)))
    close("operator", (h, *end, *ours), (h_expected, *end_expected, *theirs), 1e-4)
    h_whole = h_expected
    with torch.no_grad():
        token, ends = [x[:, 3] for x in inputs], [MlstmState(*(x.clone() for x in end)) for _ in range(3)]
        places, versions = [x.data_ptr() for x in ends[0]], [x._version for x in ends[0]]
        h, state = mlstm_step(*token, ends[0], backend="triton")
        h_expected, state_expected = mlstm_step(*token, ends[1], backend="reference")
        close("step", (h, *state), (h_expected, *state_expected), 1e-5)
        assert state is ends[0] and [x.data_ptr() for x in state] == places, "in place"
        assert all(x._version > before for x, before in zip(state, versions, strict=True)), "autograd is told"
        tokens = [x.detach() for x in token]
        close("registered step", (mlstm_step_op(*tokens, *ends[2], 15.0, 1e-6), *ends[2]), (h, *state), 1e-6)
        opcheck(mlstm_step_op, (*tokens, *ends[2], 15.0, 1e-6), test_utils=("test_schema", "test_faketensor"))
    arguments = (*[x.detach() for x in inputs], None, None, None, None, True, 15.0, 1e-6)
    opcheck(mlstm_op, arguments, test_utils=("test_schema", "test_faketensor"))
    operator = mlstm_op(*inputs, *arguments[5:])
    gradients = torch.autograd.grad(operator[0].sum() + operator[1].sum(), inputs)
    close("registered operator", (operator[0], *gradients), (h_whole, *theirs), 1e-4)
    fused = mlstm_fused_op(*leaves, *[None] * 4, 15.0, 1e-6, 1e-6)[0]
    close("registered fused operator", torch.autograd.grad(fused, leaves, cotangent), torch.autograd.grad(y, leaves, cotangent), 1e-6)
    run_mlstm_fused_with_state()


def run_mlstm_fused_with_state() -> None:
    """Two rows laid out time first as in a layer, documents, and an initial state with its gradient."""
    generator = torch.Generator().manual_seed(4)
    sizes = (64, 64, 64, 0, 0, 64)  # q, k, v, the two scalar gates, the output gate
    inputs = [torch.randn(*(s for s in (9, 2, 2, size) if s), generator=generator).transpose(0, 1) for size in sizes]
    inputs[:2] = [x + 1.0 for x in inputs[:2]]
    state = MlstmState(*(torch.rand(s, generator=generator) for s in ((2, 2, 64, 64), (2, 2, 64), (2, 2))))
    leaves = [x.requires_grad_() for x in (*inputs, torch.rand(128, generator=generator), *state[:2])]
    cu_seqlens = torch.tensor([0, 4, 9, 18], dtype=torch.int32)

    def run(tensors, backend):
        *given, c, n = tensors
        memory = MlstmState(c, n, state.m_bh.to(c.dtype))
        # norm_eps: else the norm undoes the denominator, and nothing but rounding is left of the gradient of n
        y = mlstm_fused(*given, cu_seqlens=cu_seqlens, initial_state=memory, norm_eps=0.5, backend=backend)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        return y, *torch.autograd.grad(y, tensors, cotangent.to(y.dtype))

    ours = run(leaves, "triton")
    close("fused with state", ours, run([x.detach().double().requires_grad_() for x in leaves], "reference"), 2e-5)
    assert ours[0].stride() == inputs[-1].stride() == ours[6].stride(), "y and the gate's gradient lie in memory as the gate does"
    arguments = [*[x.detach() for x in leaves[:7]], None, *[x.detach() for x in (*leaves[7:], state.m_bh)], 15.0, 1e-6, 1e-6]
    opcheck(mlstm_fused_op, arguments, test_utils=("test_schema", "test_faketensor"))


def check_swa(name, length, heads, kv_heads, window, boundaries, tile) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, heads, 16), (2, length, kv_heads, 16), (2, length, kv_heads, 16))
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    swa_launch.CONFIGS[16, True] = swa_launch.CONFIGS[16, False] = swa_launch.Config(tile, tile, tile)
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    start, end = (None, None) if boundaries is None else document_bounds(cu_seqlens, 2, length)
    o = swa_op(*inputs, window, start, end, 0.25)[0]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = swa_blocked(*wide, window, cu_seqlens=cu_seqlens)
    do = torch.randn(o.shape, generator=generator)
    gradients, theirs = torch.autograd.grad(o, inputs, do), torch.autograd.grad(expected, wide, do.double())
    close(name, (o, *gradients), (expected, *theirs), 2e-6)


def run_swa() -> None:
    documents = [0, 5, 50, 70, 71, 72, 72, 100, 140]
    for split in (False, True):
        for queries, keys, pack in ((16, 16, 1), (32, 16, 2), (16, 32, 2)):
            tile = swa_launch.Tile(queries, keys, pack, split, 4, 2)
            check_swa(f"{tile}", 45, 2, 1, 30, None, tile)
            check_swa(f"{tile} documents", 70, 2, 1, 20, documents, tile)
    check_swa("narrow", 40, 2, 1, 5, None, tile)
    check_swa("whole", 40, 1, 1, 1000, None, tile)
    inputs = [torch.randn(1, 40, heads, 64) for heads in (2, 1, 1)]
    inputs = [x.requires_grad_() for x in inputs]
    runs = [swa(*inputs, 9, backend="triton"), swa(*inputs, 9, backend="reference")]
    close("dispatch", *([o, *torch.autograd.grad(o.square().sum(), inputs)] for o in runs), 1e-5)
    for window in (9, 150, 1000):  # more keys than queries: idle queries are put before the queries
        for boundaries in (None, [0, 100, 145, 190, 192, 380]):
            earlier = [torch.randn(2, n, heads, 64).requires_grad_() for n, heads in ((40, 2), (190, 1), (190, 1))]
            cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
            runs = [swa(*earlier, window, cu_seqlens=cu_seqlens, backend=backend) for backend in ("triton", "reference")]
            close(f"earlier keys, window {window}", *([o, *torch.autograd.grad(o.square().sum(), earlier)] for o in runs), 1e-5)
    opcheck(swa_op, (*[x.detach() for x in inputs], 9, None, None, 0.125), test_utils=("test_schema", "test_faketensor"))


def check_elementwise(name, function, leaves, tolerance, operator=None) -> None:
    """Outputs and all gradients against float64, alone, under recomputation and (operator) as registered for tracing."""

    def run(call, tensors):
        outputs = call(*tensors)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        generator = torch.Generator().manual_seed(6)
        cotangents = [torch.randn(y.shape, generator=generator).to(leaves[0].dtype).to(y.dtype) for y in outputs]
        return *outputs, *torch.autograd.grad(outputs, tensors, cotangents)

    def ours(*tensors):
        return function(*tensors, backend="triton")

    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = run(ours, leaves)
    close(name, found, run(lambda *tensors: function(*tensors, backend="reference"), wide), tolerance)
    for other in (lambda *tensors: checkpoint(ours, *tensors, use_reentrant=False), operator):
        assert other is None or all(torch.equal(a, b) for a, b in zip(run(other, leaves), found, strict=True)), name


def run_elementwise() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    tolerances = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for dtype, tolerance in tolerances.items():
        for shape in ((5, 1, 688), (3, 2, 33), (1, 1), (2, 2, 5504 // 4)):
            leaves = [draw(*shape, dtype=dtype, scale=3.0) for _ in range(2)]
            check_elementwise(f"swiglu {shape} {dtype}", swiglu, leaves, tolerance, swiglu_op)
        turned = draw(12, 7, dtype=dtype), draw(7, 12, dtype=dtype).transpose(0, 1).detach().requires_grad_()
        check_elementwise(f"swiglu of views {dtype}", swiglu, turned, tolerance)
        # as in a layer: time before rows in memory; several programs' heads; a head size that is no power of two; far positions
        for d, heads, groups, last in ((16, 10, 2, 10), (12, 1, 1, 200_000), (64, 3, 9, 16_384)):
            q, k = (draw(11, 2, n, d, dtype=dtype).detach().transpose(0, 1).requires_grad_() for n in (heads, groups))
            positions = torch.randint(0, last, (2, 11), generator=generator)

            def turn(q, k, positions=positions, **options):
                return rotary(q, k, positions, 10_000.0, **options)

            def operator(q, k, positions=positions):
                return rotary_op(q, k, positions, 10_000.0, False)

            check_elementwise(f"rotary {d} {dtype}", turn, [q, k], tolerance, operator)
            y = turn(q, k, backend="triton")[0]
            assert y.stride() == q.stride(), "laid out in memory as it came"
    for dtype, parameters in ((torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)):
        for width, heads, count, splits in ((96, 4, 40, 32), (300, 2, 150, 2), (128, 9, 3, 32), (7, 1, 1, 32)):
            elementwise_launch.GATE_SPLITS = splits
            x = draw(count, 2, width, dtype=dtype)
            leaves = [x, *(draw(*shape, dtype=parameters) for _ in range(2) for shape in ((heads, width), (heads,)))]
            tolerance = 2e-6 if dtype == torch.float32 else 1e-3  # the gradients of half-precision tensors are rounded
            check_elementwise(f"gates {width} {heads} {dtype} {parameters}", gate_projections, leaves, tolerance, gates_op)
            values = gate_projections(*leaves, backend="triton")
            close("gates", values, gate_projections(*[t.detach().double() for t in leaves], backend="reference"), 2e-6)
    run_elementwise_edges(draw)


def run_elementwise_edges(draw) -> None:
    """Operators' schemas and shapes, and a NaN that goes where it belongs and nowhere else."""
    gate, up, x = draw(3, 40).detach(), draw(3, 40).detach(), draw(3, 2, 40).detach()
    parameters = [draw(2, 40).detach(), draw(2).detach(), draw(2, 40).detach(), draw(2).detach()]
    q, k = draw(2, 5, 3, 8).detach().transpose(0, 1), draw(5, 2, 1, 8).detach()
    positions = torch.arange(5)[:, None].expand(5, 2).contiguous()
    for operator, arguments in ((swiglu_op, (gate, up)), (rotary_op, (q, k, positions, 1e4, False)), (gates_op, (x, *parameters))):
        opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    gate[1, 3] = q[2, 1, 0, 5] = x[2, 1, 7] = float("nan")
    i, f = gate_projections(x, *parameters, backend="triton")
    found = swiglu(gate, up, backend="triton"), rotary(q, k, positions, 1e4, backend="triton")[0], i, f
    i, f = gate_projections(x, *parameters, backend="reference")
    expected = swiglu(gate, up, backend="reference"), rotary(q, k, positions, 1e4, backend="reference")[0], i, f
    for a, b in zip(found, expected, strict=True):
        assert bool(b.isnan().any()) and torch.equal(a.isnan(), b.isnan())


if __name__ == "__main__":
    {"mlstm": run_mlstm, "swa": run_swa, "elementwise": run_elementwise}[sys.argv[1]]()
    print("all cases agree")
