"""Memory statistics against the recurrent form of the mLSTM and against plain attention, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from swax_megatron.model import memory
from swax_megatron.model.memory import attention_use, mlstm_memory

CAP = 15.0


def recurrent(q, k, v, igate, fgate):
    """Clamped share and log state norm of one head, step by step (docs/kernels.md)."""
    n, state = torch.zeros(k.shape[1]).double(), torch.zeros(k.shape[1], v.shape[1]).double()
    m, clamped = 0.0, 0
    for t in range(len(q)):
        log_f = torch.nn.functional.logsigmoid(CAP * torch.tanh(fgate[t] / CAP)).item()
        i = (CAP * torch.tanh(igate[t] / CAP)).item()
        new = max(log_f + m, i)
        forget, take = math.exp(log_f + m - new), math.exp(i - new)
        n, state, m = forget * n + take * k[t], forget * state + take * torch.outer(k[t], v[t]), new
        clamped += float(abs((q[t] * k.shape[1] ** -0.5) @ n) < math.exp(-m))
    return clamped / len(q), math.log(state.norm()) + m


@pytest.mark.parametrize("bias", [-10.0, -3.0, 4.0])
def test_mlstm_statistics_are_the_recurrent_forms(bias, monkeypatch):
    monkeypatch.setattr(memory, "BLOCK", 16)
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 6)
    igate, fgate = torch.randn(1, 50, 2) + bias, torch.randn(1, 50, 2) + torch.tensor([3.0, 6.0])
    found = mlstm_memory(q, k, v, igate, fgate, CAP)
    for head in range(2):
        clamped, norm = recurrent(*(x[0, :, head].double() for x in (q, k, v)), igate[0, :, head].double(), fgate[0, :, head].double())
        assert found.clamped[head].item() == pytest.approx(clamped, abs=1e-6)
        assert found.state_norm[head].item() == pytest.approx(norm, abs=1e-3)
    assert found.horizon[1] > 5 * found.horizon[0]


def test_horizon_of_a_constant_gate_is_its_decay_time():
    ones = torch.ones(1, 20, 1, 4)
    gate = torch.full((1, 20, 1), 5.0)
    found = mlstm_memory(ones, ones, ones, gate - 5, gate, 1e6)
    assert found.horizon.item() == pytest.approx(-1 / math.log(1 / (1 + math.exp(-5.0))), rel=1e-4)
    saturated = mlstm_memory(ones, ones, ones, gate * 100, gate, CAP)
    assert saturated.input_saturated.item() == 1 and saturated.forget_saturated.item() == 0


@pytest.mark.parametrize("window", [1, 5, 40])
def test_attention_statistics_are_plain_attentions(window, monkeypatch):
    monkeypatch.setattr(memory, "BLOCK", 16)
    torch.manual_seed(2)
    q, k = torch.randn(2, 40, 4, 8), torch.randn(2, 40, 2, 8)
    place = torch.arange(40)
    hidden = (place[None] > place[:, None]) | (place[:, None] - place[None] >= window)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)).double() * 8**-0.5
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean((0, 2))
    found = attention_use(q, k, window)
    assert torch.allclose(found.entropy.double(), entropy, atol=1e-5)
    assert torch.allclose(found.largest_logit.double(), scores.masked_fill(hidden, -math.inf).amax((0, 2, 3)), atol=1e-5)
