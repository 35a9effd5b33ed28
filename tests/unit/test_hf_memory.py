"""An export holds one shard at most, an import a few tensors: measured as resident memory of a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from swax_megatron.checkpoint.store import Deferred, Fragment, save
from swax_megatron.config import from_dict, to_dict
from swax_megatron.hf.targets import parameter_shapes
from tests.texts import small_tokenizer
from tests.unit.hf_checkpoints import raw_config, write_data

ROOT = Path(__file__).parents[2]
SHARD = 64_000_000  # bytes; the model has 197 MB in fp32, its largest tensor 11 MB


def empty_checkpoint(root: Path, raw: dict) -> Path:
    """Weights of zero, never in memory as a whole."""
    config = from_dict(raw)
    fragments = []
    for name, shape in parameter_shapes(config, padded=True).items():
        zeros = Deferred(shape, torch.float32, lambda shape=shape: torch.zeros(1).expand(shape))
        fragments.append(Fragment(f"param.{name}", shape, (0,) * len(shape), zeros))
    return save(root, 7, fragments, config=to_dict(config), state={})


def measured(what: str, *arguments: object) -> int:
    """Resident bytes that the work added at its peak."""
    command = [sys.executable, str(Path(__file__).with_name("hf_memory.py")), what, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] - found["before"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    data = write_data(tmp_path, tokenizer)
    base = raw_config("MS")
    large = {"pattern": "(MS)x2", "hidden_size": 1024, "ffn_hidden_size": 2752}
    checkpoints = {
        name: empty_checkpoint(tmp_path / name, {**base, "model": {**base["model"], **model}})
        for name, model in (("small", {}), ("large", large))
    }
    shard = ["--tokenizer", tokenizer, "--max-shard-size", SHARD, "--dtype", "fp32"]
    added = measured("export", checkpoints["small"], checkpoints["large"], tmp_path / "out", *shard)
    files = list((tmp_path / "out").glob("*.safetensors"))
    print(f"export added {added / 1e6:.1f} MB, shard {SHARD / 1e6:.0f} MB, model {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")
    assert len(files) == 4 and added <= 1.1 * SHARD
    raw = {
        "window": base["window"],
        "data": {"sequence_length": 64, "train": [{"path": str(data)}]},
        "train": {"precision": "fp32", "steps": 10, "global_batch_size": 2},
        "validation": {"interval": 0},
        "optimizer": {"warmup": 1},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(raw))
    added = measured("import", tmp_path / "out-small", tmp_path / "out", tmp_path / "run", tmp_path / "train.yaml")
    print(f"import added {added / 1e6:.1f} MB")
    assert added <= 1.5 * SHARD  # of 590 MB that it writes
