"""The gradient norm on a GPU, summed in float32 pieces, against float64."""

from __future__ import annotations

import pytest
import torch

from swax_megatron.optim.zero import _norm_of

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("sizes", [[], [1], [40_000_003, 7, 5_000_000], [2048] * 300])
def test_norm_of_gradients(sizes):
    generator = torch.Generator("cuda").manual_seed(1)
    gradients = [10.0 ** (i % 7 - 3) * torch.randn(size, device="cuda", generator=generator) for i, size in enumerate(sizes)]
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    assert float(_norm_of(gradients, torch.device("cuda"))) == pytest.approx(expected, rel=1e-6)
