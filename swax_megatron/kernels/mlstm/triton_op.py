"""The mLSTM's Triton kernels under autograd: as operators `swax::mlstm*` for tracing, as Functions in eager mode.

Both do the same; a registered operator costs some 0.3 ms of Python a call more, as much as the kernels of a small layer.

Importing this module needs Triton; the dispatch in `__init__.py` imports it only for tensors it is meant for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_launch as launch
from .state import MlstmState

SHAPES = tuple(launch.CONFIGS)  # (d_qk, d_v) with a tested configuration


def _no_cap(gate_cap: float | None) -> float:
    return -1.0 if gate_cap is None else float(gate_cap)


def _config(q: Tensor, v: Tensor) -> launch.Config:
    return launch.CONFIGS[q.shape[-1], v.shape[-1]]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    start: Tensor | None,
    c0: Tensor | None,
    n0: Tensor | None,
    m0: Tensor | None,
    want_state: bool,
    gate_cap: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, final C, n, m (empty unless wanted), and what the backward pass saves (`launch.Saved`)."""
    h, *end, saved = launch.forward(q, k, v, igate, fgate, start, c0, n0, m0, want_state, gate_cap, eps, _config(q, v))
    return h, *(end if want_state else (_empty(q) for _ in range(3))), *saved


def _empty(q: Tensor, *shape: int) -> Tensor:
    return q.new_empty(shape or 0, dtype=torch.float32)


mlstm_op = torch.library.custom_op("swax::mlstm", _forward, mutates_args=())


def _empty_saved(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scalars, states = launch.saved_sizes(*q.shape, v.shape[-1], _config(q, v).chunk)
    return _empty(q, *scalars), q.new_empty(states, dtype=torch.float32 if q.dtype == torch.float32 else torch.bfloat16)


@mlstm_op.register_fake
def _(q, k, v, igate, fgate, start, c0, n0, m0, want_state, gate_cap, eps):
    batch, _, heads, d_qk = q.shape
    end = [_empty(q) for _ in range(3)]
    if want_state:
        end = _empty(q, batch, heads, d_qk, v.shape[-1]), _empty(q, batch, heads, d_qk), _empty(q, batch, heads)
    return v.new_empty(v.shape), *end, *_empty_saved(q, v)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    start: Tensor | None,
    h: Tensor,
    dh: Tensor,
    dot: Tensor | None,
    dc_end: Tensor | None,
    dn_end: Tensor | None,
    scalars: Tensor,
    states: Tensor,
    want_initial: bool,
    gate_cap: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, igate, fgate and of the initial C and n (empty unless wanted). dot: <dh, h> if known."""
    *gradients, dc0, dn0 = _launch_backward(
        q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end, scalars, states, want_initial, gate_cap, eps
    )
    return *gradients, *((dc0, dn0) if want_initial else (_empty(q), _empty(q)))


def _launch_backward(q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end, scalars, states, want_initial, gate_cap, eps):
    saved = launch.Saved(scalars, states)
    return launch.backward(q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end, saved, want_initial, gate_cap, eps, _config(q, v))


mlstm_backward_op = torch.library.custom_op("swax::mlstm_backward", _backward, mutates_args=())


@mlstm_backward_op.register_fake
def _(q, k, v, igate, fgate, start, h, dh, dot, dc_end, dn_end, scalars, states, want_initial, gate_cap, eps):
    batch, _, heads, d_qk = q.shape
    gates = [q.new_empty(igate.shape, dtype=torch.float32) for _ in range(2)]
    initial = ((batch, heads, d_qk, v.shape[-1]), (batch, heads, d_qk)) if want_initial else ((0,), (0,))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *gates, *(q.new_empty(s, dtype=torch.float32) for s in initial)


def _save(ctx, inputs, output) -> None:
    q, k, v, igate, fgate, start, c0, _, _, want_state, ctx.gate_cap, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, igate, fgate, start, output[0], *output[4:])
    ctx.want_state, ctx.want_initial = want_state, c0 is not None
    ctx.set_materialize_grads(False)  # or every saved tensor would get a gradient of zeros


def _differentiate(run, ctx, dh, dc_end, dn_end):
    q, k, v, igate, fgate, start, h, scalars, states = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(h)
    if ctx.want_state and (dc_end is not None or dn_end is not None):
        batch, _, heads, d_qk = q.shape
        dc_end = q.new_zeros(batch, heads, d_qk, v.shape[-1], dtype=torch.float32) if dc_end is None else dc_end.contiguous()
        dn_end = q.new_zeros(batch, heads, d_qk, dtype=torch.float32) if dn_end is None else dn_end.contiguous()
    else:
        dc_end = dn_end = None
    gradients = run(q, k, v, igate, fgate, start, h, dh, None, dc_end, dn_end, scalars, states, ctx.want_initial, ctx.gate_cap, ctx.eps)
    initial = gradients[5:] if ctx.want_initial else (None, None)
    return *gradients[:5], None, *initial, None, None, None, None


mlstm_op.register_autograd(lambda ctx, dh, dc, dn, *_: _differentiate(mlstm_backward_op, ctx, dh, dc, dn), setup_context=_save)


class _Mlstm(torch.autograd.Function):
    """h, with want_state also the final C, n, m."""

    @staticmethod
    def forward(ctx, q, k, v, igate, fgate, start, c0, n0, m0, want_state, gate_cap, eps):
        h, *end, saved = launch.forward(q, k, v, igate, fgate, start, c0, n0, m0, want_state, gate_cap, eps, _config(q, v))
        ctx.save_for_backward(q, k, v, igate, fgate, start, h, *saved)
        ctx.want_state, ctx.want_initial, ctx.gate_cap, ctx.eps = want_state, c0 is not None, gate_cap, eps
        ctx.set_materialize_grads(False)
        if not want_state:
            return h
        ctx.mark_non_differentiable(end[2])
        return h, *end

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dc_end=None, dn_end=None, _=None):
        return _differentiate(_launch_backward, ctx, dh, dc_end, dn_end)


def _fused_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    ogate: Tensor,
    norm_weight: Tensor,
    start: Tensor | None,
    c0: Tensor | None,
    n0: Tensor | None,
    m0: Tensor | None,
    gate_cap: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (the gated, normed h), and h with what the cell's backward pass saves."""
    h, _, _, _, saved = launch.forward(q, k, v, igate, fgate, start, c0, n0, m0, False, gate_cap, eps, _config(q, v))
    return launch.norm_gate_forward(h, ogate, norm_weight, norm_eps), h, *saved


mlstm_fused_op = torch.library.custom_op("swax::mlstm_fused", _fused_forward, mutates_args=())


@mlstm_fused_op.register_fake
def _(q, k, v, igate, fgate, ogate, norm_weight, start, c0, n0, m0, gate_cap, eps, norm_eps):
    return torch.empty_like(launch.rows(ogate)), v.new_empty(v.shape), *_empty_saved(q, v)


def _norm_gate_backward(
    dy: Tensor, h: Tensor, ogate: Tensor, norm_weight: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh, dogate, dweight, and <dh, h> for the cell's backward pass."""
    return launch.norm_gate_backward(dy, h, ogate, norm_weight, norm_eps)


norm_gate_backward_op = torch.library.custom_op("swax::norm_gate_backward", _norm_gate_backward, mutates_args=())


@norm_gate_backward_op.register_fake
def _(dy, h, ogate, norm_weight, norm_eps):
    dot = h.new_empty(h.shape[:3], dtype=torch.float32)
    return h.new_empty(h.shape), torch.empty_like(launch.rows(ogate)), norm_weight.new_empty(norm_weight.shape), dot


def _save_fused(ctx, inputs, output) -> None:
    q, k, v, igate, fgate, ogate, norm_weight, start, c0, _, _, ctx.gate_cap, ctx.eps, ctx.norm_eps = inputs
    ctx.save_for_backward(q, k, v, igate, fgate, ogate, norm_weight, start, *output[1:])
    ctx.want_initial = c0 is not None
    ctx.set_materialize_grads(False)


def _differentiate_fused(run_norm, run, ctx, dy):
    q, k, v, igate, fgate, ogate, norm_weight, start, h, *saved = ctx.saved_tensors
    dh, dogate, dweight, dot = run_norm(dy, h, ogate, norm_weight, ctx.norm_eps)
    cell = run(q, k, v, igate, fgate, start, h, dh, dot, None, None, *saved, ctx.want_initial, ctx.gate_cap, ctx.eps)
    initial = cell[5:] if ctx.want_initial else (None, None)
    return *cell[:5], dogate, dweight, None, *initial, None, None, None, None


mlstm_fused_op.register_autograd(
    lambda ctx, dy, *_: _differentiate_fused(norm_gate_backward_op, mlstm_backward_op, ctx, dy), setup_context=_save_fused
)


class _MlstmFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _fused_forward(*inputs)
        _save_fused(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _differentiate_fused(launch.norm_gate_backward, _launch_backward, ctx, dy)


def _step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, gate_cap: float, eps: float
) -> Tensor:
    """One decoding step, without a gradient: h (B, H, V); c, n, m (contiguous) are overwritten."""
    return launch.step(q, k, v, igate, fgate, c, n, m, gate_cap, eps)


mlstm_step_op = torch.library.custom_op("swax::mlstm_step", _step, mutates_args=("c", "n", "m"))


@mlstm_step_op.register_fake
def _(q, k, v, igate, fgate, c, n, m, gate_cap, eps):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _initial(state: MlstmState | None) -> list[Tensor | None]:
    return [None] * 3 if state is None else [x.contiguous() for x in (state.c_bhkv, state.n_bhk, state.m_bh.detach())]


def mlstm_cell(q, k, v, igate, fgate, start, state: MlstmState | None, want_state: bool, gate_cap: float | None, eps: float):
    """h and the final state (None unless wanted), differentiable."""
    arguments = (q, k, v, igate, fgate, start, *_initial(state), want_state, _no_cap(gate_cap), eps)
    if torch.compiler.is_compiling():
        h, *end = mlstm_op(*arguments)[:4]
    elif not torch.is_grad_enabled():
        h, *end, _ = launch.forward(*arguments, _config(q, v))
    elif want_state:
        h, *end = _Mlstm.apply(*arguments)
    else:
        return _Mlstm.apply(*arguments), None
    return h, MlstmState(end[0], end[1], end[2].detach()) if want_state else None


def mlstm_fused_cell(
    q, k, v, igate, fgate, ogate, norm_weight, start, state: MlstmState | None, gate_cap: float | None, eps: float, norm_eps: float
) -> Tensor:
    """The gated, normed h, differentiable in the initial state as well."""
    arguments = (q, k, v, igate, fgate, ogate, norm_weight, start, *_initial(state), _no_cap(gate_cap), eps, norm_eps)
    if torch.compiler.is_compiling():
        return mlstm_fused_op(*arguments)[0]
    return _MlstmFused.apply(*arguments) if torch.is_grad_enabled() else _fused_forward(*arguments)[0]


def mlstm_step_cell(q, k, v, igate, fgate, state: MlstmState, gate_cap: float | None, eps: float) -> Tensor:
    """h; the state is overwritten, and autograd is told so."""
    if torch.compiler.is_compiling():
        return mlstm_step_op(q, k, v, igate, fgate, *state, _no_cap(gate_cap), eps)
    h = _step(q, k, v, igate, fgate, *state, _no_cap(gate_cap), eps)
    torch.autograd.graph.increment_version([x for x in state if not x.is_inference()])
    return h
