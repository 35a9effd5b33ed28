"""Pools of real processes joined by torch.distributed: started once a session, used for many checks.

Each worker is a fresh interpreter (spawn) on one gloo group, or on NCCL where a GPU is there for every process. A task
is a module-level function, called on every rank at once; its picklable results come back in rank order.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import queue
import socket
import traceback
from typing import Any

import psutil
import torch.multiprocessing as multiprocessing

CROWD = 160  # threads of one worker: a layout's groups take up to sixty
# seconds a task may take before the pool is taken for hung; every rank then prints where it stands
TIMEOUT = float(os.environ.get("SWAX_TEST_TASK_SECONDS", "240"))


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Workers:
    """``size`` processes of one job."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        self._tasks = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        port = free_port()
        self._processes = [
            context.Process(target=_serve, args=(rank, size, port, self._tasks[rank], self._results), daemon=True) for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Any, *arguments: Any, **named: Any) -> list[Any]:
        """Call ``function`` on every rank; the results by rank. A failure on any rank fails the test and ends the pool."""
        for tasks in self._tasks:
            tasks.put((function.__module__, function.__qualname__, arguments, named))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            try:
                rank, ok, value = self._results.get(timeout=TIMEOUT)
            except queue.Empty:
                self.close()
                missing = sorted(set(range(self.size)) - results.keys())
                raise AssertionError(f"ranks {missing} of {self.size} gave no result within {TIMEOUT:.0f} s") from None
            if not ok:
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    @property
    def crowded(self) -> bool:
        """Whether groups of earlier tasks are still held (DeepSpeed's stage 3 does): their threads wake a hundred times a second."""
        return self.alive and max(psutil.Process(process.pid).num_threads() for process in self._processes) > CROWD

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, size: int, port: int, tasks: Any, results: Any) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    environment |= {"LOCAL_WORLD_SIZE": size, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1, "CUDA_DEVICE_MAX_CONNECTIONS": 1}
    os.environ.update({name: str(value) for name, value in environment.items()})
    import torch

    torch.set_num_threads(1)
    from swax_megatron.parallel.device import install_cpu_shim
    from swax_megatron.train import quiet_libraries

    quiet_libraries()
    install_cpu_shim()
    while True:
        module, name, arguments, named = tasks.get()
        faulthandler.dump_traceback_later(0.9 * TIMEOUT)
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            results.put((rank, True, function(*arguments, **named)))
        except BaseException:  # the parent fails the test with it
            results.put((rank, False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
