"""The borders of a tensor-parallel region with transfers under way, against one process, in float64: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swax_megatron.model.overlap import EnterAndProject, ProjectAndLeave
from tests import runs

TOKENS, ROWS, HIDDEN, COLUMNS = 8, 3, 10, 6  # tokens and columns of one rank


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sequence", [True, False])
def test_borders(size: int, sequence: bool, workers: Any, corpus: Any, tmp_path: Any) -> None:
    parallel = {"tensor": size, "sequence": sequence}
    raw = runs.small_config(corpus, tmp_path, parallel=parallel, model={"attention_kv_heads": 4})
    found = workers(size).run(differences, raw)
    assert max(max(each.values()) for each in found) < 1e-12, found


def differences(raw: dict[str, Any]) -> dict[str, float]:
    """Largest differences on this rank."""
    with runs.layout(raw) as (config, groups):
        return _differences(groups.tensor, config.parallel.sequence)


def _differences(group: dist.ProcessGroup, sequence: bool) -> dict[str, float]:
    rank, size = group.rank(), group.size()
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()

    x, gate = draw(TOKENS * size, ROWS, HIDDEN), draw(HIDDEN).detach()
    weights, down = [draw(COLUMNS * size, HIDDEN) for _ in range(3)], draw(HIDDEN, COLUMNS * size)
    cotangent = draw(TOKENS * size, ROWS, HIDDEN).detach()
    y = _hidden(*(x @ weight.t() for weight in weights)) @ down.t()
    ((y * cotangent).sum() + (x * gate).sum()).backward()

    tokens = slice(rank * TOKENS, (rank + 1) * TOKENS) if sequence else slice(None)
    columns = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    mine = [each.detach().clone().requires_grad_() for each in (x[tokens], *(weight[columns] for weight in weights), down[:, columns])]
    whole, *products = EnterAndProject.apply(mine[0], group, sequence, *mine[1:-1])
    hidden = _hidden(*products).transpose(0, 1).contiguous().transpose(0, 1)  # as a mixer's core leaves it
    part = ProjectAndLeave.apply(hidden, mine[-1], group) if sequence else hidden @ mine[-1].t()
    ((part * cotangent[tokens]).sum() + (whole * gate).sum() / size).backward()
    expected = [x.grad[tokens], *(weight.grad[columns] for weight in weights[:2]), down.grad[:, columns]]
    found = [mine[0].grad, *(each.grad for each in mine[1:3]), mine[-1].grad]
    assert mine[3].grad is None, "its product was not used"
    values = {"x": float((whole - x).abs().max()), "y": float((part - y[tokens]).abs().max()) if sequence else 0.0}
    return values | {f"gradient {n}": float((a - b).abs().max()) for n, (a, b) in enumerate(zip(found, expected, strict=True))}


def _hidden(a: Tensor, b: Tensor, unused: Tensor) -> Tensor:
    return a * b.sigmoid()
