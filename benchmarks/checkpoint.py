"""Time how long a save blocks training, in the background against a synchronous, fsynced save, with the real backend's fragments.

Builds the model and the optimizer of a configuration (no data is read), then saves it several times each way into --folder and deletes
what it wrote. After a background save's start, matrix products run for half the time of a synchronous save in place of the next step's
passes; then comes the update, which waits for the copy to host memory. Prints one JSON line: seconds each save blocked (start + that
wait), seconds until its values were in host memory (copy_seconds: beyond the time to the next update, training waits for the rest) and
until it was complete, bytes, device and versions. The first background save allocates its host memory and is told apart.
Run it as torchrun starts a training run, or as one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from swax_megatron.config import load_config, to_dict
from swax_megatron.parallel import device
from swax_megatron.train import quiet_libraries

EPILOG = """example (1.4B on one GPU of 80 GB, 16.4 GiB a save):
  python -m benchmarks.checkpoint configs/swax_1p4b.yaml parallel.tensor=1 --folder /local/disk
"""


def synchronize(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def busy(where: torch.device, seconds: float) -> float:
    """Matrix products in place of training steps, for so long; how many were done a second."""
    a = torch.randn(256 if where.type == "cpu" else 4096, 256 if where.type == "cpu" else 4096, device=where)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (a @ a).sum().item()
        count += 1
    return count / (time.perf_counter() - started)


def measure(config: Any, groups: Any, folder: Path, saves: int) -> dict[str, Any]:
    from swax_megatron.checkpoint.background import BackgroundSaver
    from swax_megatron.checkpoint.store import save
    from swax_megatron.model.swax import build_model
    from swax_megatron.optim.build import build_optimizer

    backend = build_optimizer(config, build_model(config, groups), groups)
    shared = {"config": to_dict(config), "state": {}, "group": groups.cpu}
    size = sum(fragment.tensor.numel() * fragment.tensor.element_size() for fragment in backend.fragments(saving=True))
    saver = BackgroundSaver(config.train.distributed_timeout)
    synchronous, blocked, copied, complete, slowed = [], [], [], [], []
    quiet = busy(groups.device, 2.0)
    for number in range(saves):
        synchronize(groups.device)
        started = time.perf_counter()
        save(folder / "sync", number, backend.fragments(saving=True), **shared)
        synchronous.append(time.perf_counter() - started)
        shutil.rmtree(folder / "sync", ignore_errors=True)
    step_seconds = 0.5 * median(synchronous)
    for number in range(saves):
        synchronize(groups.device)
        started = time.perf_counter()
        saver.start(folder / "async", number, backend.fragments(saving=True), **shared)
        begun = time.perf_counter() - started
        slowed.append(busy(groups.device, step_seconds) / quiet)
        update = time.perf_counter()
        saver.copied()
        blocked.append(begun + time.perf_counter() - update)
        copied.append(saver.copy_seconds)
        saver.finish(groups.cpu)
        complete.append(time.perf_counter() - started)
        shutil.rmtree(folder / "async", ignore_errors=True)
    later = blocked[1:]
    return {
        "bytes_of_this_rank": size,
        "seconds_until_the_next_update": round(step_seconds, 4),
        "synchronous_s": [round(value, 4) for value in synchronous],
        "background_blocked_s": [round(value, 4) for value in blocked],
        "copy_seconds": [round(value, 4) for value in copied],
        "background_complete_s": [round(value, 4) for value in complete],
        "blocked_share_from_the_second_save_on": round(max(later) / median(synchronous), 5),
        "speed_of_compute_meanwhile": [round(value, 3) for value in slowed],
        "host_memory_bytes": saver.snapshot.nbytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to save, on the disk to be measured (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=4, help="saves each way (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the line to this file as well")
    options = parser.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    device.install_cpu_shim()
    from swax_megatron.parallel import groups

    try:
        config = load_config(options.config, options.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    joined = groups.initialize(config)
    folder = Path(options.folder) / f"checkpoint-benchmark-{os.environ['MASTER_PORT']}-{joined.world_size}"
    try:
        found = measure(config, joined, folder, options.saves)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        groups.shut_down()
    if int(os.environ["RANK"]) == 0:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        where = {"device": gpu or platform.processor() or platform.machine(), "ranks": joined_size(), "torch": torch.__version__}
        command = "python -m benchmarks.checkpoint " + " ".join(sys.argv[1:])
        case = {"case": f"checkpoint {Path(options.config).stem}", **where, **found}
        line = json.dumps({**case, "date": time.strftime("%F"), "command": command})
        print(line)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 0


def joined_size() -> int:
    return int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    sys.exit(main())
