"""The trainer on the Triton kernels, in Triton's CPU interpreter, against plain torch.

`python -m tests.parallel.interpreted_run CORPUS RUNS`

A process of its own, because TRITON_INTERPRET is read when a kernel is defined. One M and one S layer of the smallest sizes that have
kernels, in float32, under ZeRO's stage 3 with selective recomputation: the path by which every kernel is called and recomputed.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from tests.unit import triton_cases  # noqa: F401  (switches the interpreter on, before any kernel is defined)
from tests.workers import free_port

MODEL = {"pattern": "MS", "hidden_size": 64, "ffn_hidden_size": 96, "mlstm_heads": 1, "mlstm_qk_dim": 64, "mlstm_v_dim": 64}
MODEL |= {"attention_heads": 1, "attention_kv_heads": 1, "attention_head_dim": 64}
TOLERANCE = 2e-5  # of a tensor's largest value: float32 rounding in another order


def main(corpus: Path, run_dir: Path) -> None:
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch.distributed as dist

    from swax_megatron.parallel.device import install_cpu_shim
    from tests import runs

    install_cpu_shim()
    dist.init_process_group("gloo")
    runs.validate = partial(runs.validate, cuda=True)  # which would refuse the kernels for want of a GPU
    found = {}
    for backend in ("reference", "triton"):
        train = {"steps": 2, "global_batch_size": 2, "recompute": "selective"}
        sections = {"model": MODEL, "kernels": {"backend": backend}, "optimizer": {"zero_stage": 3}, "checkpoint": {"interval": 2}}
        runs.train(runs.small_config(corpus, run_dir / backend, train=train, **sections))
        found[backend] = runs.weights(run_dir / backend, 2)
    for name, expected in found["reference"].items():
        error = float((found["triton"][name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        assert error < TOLERANCE, f"{name}: {error:.1e}"
    print("the runs agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
