"""RMSNorm, loss, update and 8 bits: the kernels in Triton's interpreter, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swax_megatron.config import from_dict
from swax_megatron.validate import validate


def test_interpreted_kernels_match_the_reference() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.unit.step_cases"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all cases agree" in done.stdout


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"train": {"fp8": True, "precision": "fp32"}}, "train.precision=bf16"),
        ({"train": {"fp8": True}, "optimizer": {"zero_stage": 3}}, "optimizer.zero_stage=3"),
        ({"train": {"fp8": True}, "model": {"ffn_hidden_size": 1000}}, "model.ffn_hidden_size is 1000"),
        ({"train": {"fp8": True}, "kernels": {"backend": "reference"}}, "kernels.backend=auto"),
        ({"train": {"fp8": True}, "parallel": {"tensor": 2, "overlap": True}}, "parallel.overlap=true"),
        # widths of mixers that the pattern does not hold are no matter
        ({"train": {"fp8": True}, "model": {"pattern": "S", "mlstm_heads": 4, "mlstm_qk_dim": 6}}, "8 bits cannot run here"),
        ({"train": {"fp8": True}}, "8 bits cannot run here"),
    ],
)
def test_eight_bits_are_refused_where_they_cannot_run(sections: dict, named: str) -> None:
    raw = {"data": {"train": [{"path": "somewhere"}]}, "validation": {"interval": 0}, **sections}
    raw["optimizer"] = {"warmup": 10, **sections.get("optimizer", {})}
    with pytest.raises(ValueError, match=named):
        validate(from_dict(raw), cuda=False)
