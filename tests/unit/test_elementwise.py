"""SwiGLU's activation, rotary positions and gate projections: the references, the refusals, the kernels in Triton's CPU interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swax_megatron.kernels.elementwise import gate_projections, rotary, swiglu


def test_interpreted_kernels_match_the_reference() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.unit.triton_cases", "elementwise"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all cases agree" in done.stdout


def test_rotary_turns_pairs_of_channels() -> None:
    """The products of the complex numbers x_i + i x_(i + D/2) with e^(i p theta): in the kernels and here, written another way."""
    q, k = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 1, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]])
    theta = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(2, 5, 1, 4, dtype=torch.float64), positions[:, :, None, None] * theta)
    for x, y in zip((q, k), rotary(q, k, positions, 100.0), strict=True):
        expected = torch.complex(x[..., :4], x[..., 4:]) * turn
        assert torch.allclose(y, torch.cat([expected.real, expected.imag], -1), atol=1e-5)  # angles are float32
    assert torch.equal(rotary(q, k, positions, 100.0)[0][0, 0], q[0, 0])


def test_references_gradients() -> None:
    wide = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, wide)
    shapes = ((2, 3, 5), (4, 5), (4,), (4, 5), (4,))
    assert torch.autograd.gradcheck(gate_projections, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def rotary_of(q: Tensor, k: Tensor, *, positions: Tensor | None = None, base: float = 1e4) -> None:
    rotary(q, k, torch.zeros(2, 3, dtype=torch.int64) if positions is None else positions, base)


def gates_of(x: Tensor, **changed: Tensor) -> None:
    weights, biases = ({f"{gate}_{what}": torch.ones(s) for gate in ("igate", "fgate")} for what, s in (("weight", (4, 8)), ("bias", 4)))
    gate_projections(x, **{**weights, **biases, **changed})


X, Q, K = torch.ones(2, 8), torch.ones(2, 3, 4, 8), torch.ones(2, 3, 1, 8)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: swiglu(X, X[:1]), "up must have"),
        (lambda: swiglu(X, X.double()), "up is"),
        (lambda: swiglu(X.int(), X), "gate has dtype"),
        (lambda: swiglu(X[:0], X[:0]), "gate must be a tensor"),
        (lambda: swiglu(X, X, backend="cuda"), "backend must be"),
        (lambda: rotary_of(Q[..., :7], K), "q must have"),
        (lambda: rotary_of(Q, K[:, :2]), "k must have"),
        (lambda: rotary_of(Q, K, positions=torch.zeros(2, 3)), "positions must be"),
        (lambda: rotary_of(Q, K, base=0.0), "base must be"),
        (lambda: gates_of(X[0]), "x must have"),
        (lambda: gates_of(X, igate_weight=torch.ones(4, 7)), "igate_weight must"),
        (lambda: gates_of(X, fgate_weight=torch.ones(3, 8)), "fgate_weight must"),
        (lambda: gates_of(X, igate_bias=torch.ones(5)), "igate_bias must"),
        (lambda: gates_of(X, fgate_bias=torch.ones(4).double()), "fgate_bias is float64"),
    ],
)
def test_bad_arguments_are_named(call, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()


def test_triton_where_it_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="backend 'triton' cannot run"):
        swiglu(X, X, backend="triton")
