"""Compare the plan's memory with the peak of real training steps on one GPU.

Builds the model and the optimizer of a configuration on one process, trains two steps on random tokens at the run's largest window, and
prints one JSON line a case: the plan's bytes by part, the allocator's peak in the second step (what tensors take, and what is reserved),
their ratio, device and versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from typing import Any

import torch

from swax_megatron.config import load_config
from swax_megatron.parallel import device
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.memory import memory
from swax_megatron.train import quiet_libraries
from swax_megatron.validate import validate

EPILOG = """example (every recomputation of the 1.4B model on one H100):
  for how in none selective full; do
    python -m benchmarks.plan_memory configs/swax_1p4b.yaml parallel.tensor=1 train.global_batch_size=2 train.recompute=$how
  done
"""


def train_twice(config: Any, groups: Any) -> tuple[int, int]:
    """Bytes allocated and reserved at the peak of the second step."""
    from swax_megatron.data.packing import pack
    from swax_megatron.execution import Pass, run_microbatches
    from swax_megatron.model.swax import build_model
    from swax_megatron.model.window import WindowSchedule
    from swax_megatron.optim.build import build_optimizer

    backend = build_optimizer(config, build_model(config, groups), groups)
    windows = WindowSchedule.from_config(config).expand(max(config.window.windows))
    random = torch.Generator().manual_seed(1)
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    batches = []
    for _ in range(config.train.global_batch_size // rows):
        ids = torch.randint(3, config.model.vocab_size, (rows, length + 1), generator=random).numpy()
        batch = pack(ids, ids >= 0, 2, config.model.document_boundary)
        moved = {item.name: getattr(batch, item.name).to(groups.device) for item in dataclasses.fields(batch)}
        batches.append(type(batch)(**moved))
    for step in range(2):
        if step:
            torch.cuda.reset_peak_memory_stats()
        backend.zero_grad(len(batches))
        run_microbatches(Pass(config, groups, backend.chunks, windows), batches, backward=True)
        backend.reduce()
        backend.update(1e-5)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value; the layout must be that of one process")
    options = parser.parse_args()
    try:
        config = load_config(options.config, options.overrides)
        validate(config, 1)
        if not torch.cuda.is_available():
            raise ValueError("this needs a CUDA GPU; on the CPU tests/parallel/test_plan_memory.py compares the plan with tensors")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    device.install_cpu_shim()
    from swax_megatron.parallel import groups

    joined = groups.initialize(config)
    try:
        allocated, reserved = train_twice(config, joined)
    finally:
        groups.shut_down()
    planned = memory(Layout.of(config, 1, "triton" if config.kernels.backend != "reference" else "reference"), 0)
    line = {
        "case": "plan memory",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "plan": {**dataclasses.asdict(planned), "total": planned.total},
        "allocated": allocated,
        "reserved": reserved,
        "allocated over plan": round(allocated / planned.total, 4),
        "date": time.strftime("%F"),
        "command": "python -m benchmarks.plan_memory " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
