"""Nodes that measure each other: a clock comparison, then an all-reduce with either neighbour in a ring.

Pairs, not all nodes at once: one slow link slows an all-reduce of all nodes equally and names nobody. Every node is
in two pairs, (0,1)(2,3).. and (1,2)(3,4)..; its bandwidth is the better of the two, so only a node that is slow itself is slow.
Nothing is collective over all nodes: a dead node costs its neighbours one time-out each and hides nobody.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MEGABYTES = 64
ROUNDS = 5


@dataclass(frozen=True)
class Meeting:
    """This node among others. store: host:port of the node of rank 0; timeout: seconds to wait for the others."""

    name: str
    rank: int
    nodes: int
    store: str
    timeout: float

    @classmethod
    def of_environment(cls, nodes: int, store: str | None, timeout: float) -> Meeting:
        """Rank and name from Slurm's environment; a single node needs none. Raises ValueError."""
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        if nodes == 1:
            return cls(name, 0, 1, "localhost:0", timeout)
        rank = os.environ.get("SLURM_NODEID", "")
        host, _, port = (store or "").rpartition(":")
        if not rank.isdigit() or not host or not port.isdigit():
            raise ValueError(f"--nodes {nodes} --store {store}: run it with srun, one task a node, and name the first node and a port")
        return cls(name, int(rank), nodes, store, timeout)

    def measure(self, cuda: bool) -> dict[str, Any]:
        """``skew`` (seconds ahead of the first node), ``bandwidth`` (GB/s, None where no neighbour answered), ``network_faults``.

        ``reached`` is there and False where the first node did not answer at all.
        """
        host, _, port = self.store.rpartition(":")
        wait = timedelta(seconds=self.timeout)
        try:
            store = dist.TCPStore(host, int(port), None, self.rank == 0, wait, wait_for_workers=False)
            store.set(f"here/{self.rank}", "1")
        except (dist.DistError, RuntimeError) as error:
            return {"bandwidth": None, "reached": False, "network_faults": [f"cannot reach node 0 at {self.store} ({_line(error)})"]}
        report: dict[str, Any] = {"skew": self._skew(store), "network_faults": []}
        speeds, missing = [], []
        for left in self._pairs():
            pair = (left, (left + 1) % self.nodes)
            speed, problem = self._all_reduce(store, pair, cuda)
            if speed is not None:
                speeds.append(speed)
            else:
                missing.append(f"no all-reduce with node number {pair[0] if pair[1] == self.rank else pair[1]} ({problem})")
        report["bandwidth"] = max(speeds, default=None)
        if not speeds:  # with one good neighbour the fault is the other's
            report["network_faults"] += missing
        store.set(f"done/{self.rank}", "1")
        if self.rank == 0:  # it holds the store
            self._await(store, [f"done/{rank}" for rank in range(self.nodes)])
        return report

    def _pairs(self) -> list[int]:
        """The left member of each pair that this node is in: pairs that begin at even ranks come first, on every node."""
        left = {self.rank, (self.rank - 1) % self.nodes} if self.nodes > 2 else {0}
        return sorted(left, key=lambda rank: (rank % 2, rank))

    def _skew(self, store: dist.Store) -> float | None:
        """This clock minus the first node's, by one request and its answer: right to half a round trip."""
        if self.rank == 0:
            for rank in range(1, self.nodes):
                if self._await(store, [f"ask/{rank}"]):
                    store.set(f"clock/{rank}", str(time.time()))
            return 0.0
        if not self._await(store, ["here/0"]):
            return None
        before = time.time()
        store.set(f"ask/{self.rank}", "1")
        if not self._await(store, [f"clock/{self.rank}"]):
            return None
        after = time.time()
        answer = float(store.get(f"clock/{self.rank}"))
        return 0.0 if before <= answer <= after else (before - answer if before > answer else after - answer)

    def _await(self, store: dist.Store, keys: list[str]) -> bool:
        try:
            store.wait(keys, timedelta(seconds=self.timeout))
        except (dist.DistError, RuntimeError):
            return False
        return True

    def _all_reduce(self, store: dist.Store, pair: tuple[int, int], cuda: bool) -> tuple[float | None, str]:
        """GB/s of an all-reduce between two nodes: bytes / seconds, which for two ranks is also the bus bandwidth."""
        wait = timedelta(seconds=self.timeout)
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore(f"pair/{pair[0]}", store),
                rank=pair.index(self.rank),
                world_size=2,
                timeout=wait,
            )
            device = torch.device("cuda", 0) if cuda else torch.device("cpu")
            data = torch.ones(MEGABYTES * 250_000, device=device)
            best = float("inf")
            for _ in range(ROUNDS):
                if cuda:
                    torch.cuda.synchronize(device)
                started = time.perf_counter()
                dist.all_reduce(data)
                if cuda:
                    torch.cuda.synchronize(device)
                best = min(best, time.perf_counter() - started)
            return data.numel() * 4 / best / 1e9, ""
        except (dist.DistError, RuntimeError) as error:
            return None, _line(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
