"""Nodes that measure each other: a clock comparison, then an all-reduce with either neighbour in a ring.

Pairs, not all nodes at once: one slow link slows an all-reduce of all nodes equally and names nobody. Every node is
in two pairs, (0,1)(2,3).. and (1,2)(3,4)..; its bandwidth is the better of the two, so only a node that is slow itself is slow.
The ring is that of the nodes that came; of those that do not answer in it each costs its neighbours a time-out and hides nobody.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
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

    @property
    def longest(self) -> float:
        """Seconds after which ``measure`` has ended, whoever hangs: connecting, the meeting, the clocks, one pair after the other."""
        return 2.5 * self.timeout + self._all_pairs + 20

    @property
    def _all_pairs(self) -> float:
        return sum(self._wait(phase) for phase in range(3))

    def measure(self, cuda: bool) -> dict[str, Any]:
        """``skew`` (seconds ahead of the first node, None where unknown), ``bandwidth`` (GB/s, None where no neighbour answered),
        ``missed``: rank -> what went wrong, of the neighbours that did not answer.

        ``reached`` False and ``problem`` where the first node did not answer, at the start or later.
        """
        host, _, port = self.store.rpartition(":")
        wait = timedelta(seconds=self.timeout)
        report: dict[str, Any] = {"skew": None, "bandwidth": None, "missed": {}}
        try:
            store = dist.TCPStore(host, int(port), None, self.rank == 0, wait, wait_for_workers=False)
            present = self._gather(store)
            if self.rank not in present:
                return report | {"reached": False, "problem": f"it came later than {self.timeout:g} s after the first"}
            report["skew"] = self._skew(store, present)
            speeds, ends = [], time.monotonic() + self._all_pairs
            for phase, pair in self._pairs(present):
                speed, problem = self._all_reduce(store, pair, self._wait(phase), cuda)
                if speed is not None:
                    speeds.append(speed)
                else:
                    report["missed"][str(pair[0] if pair[1] == self.rank else pair[1])] = problem
            report["bandwidth"] = max(speeds, default=None)
            store.set(f"done/{self.rank}", "1")
            if self.rank == 0:  # it holds the store
                self._arrived(store, "done", present, ends - time.monotonic() + self.timeout / 4)
        except (dist.DistError, RuntimeError) as error:
            return report | {"reached": False, "problem": f"{self.store}: {_line(error)}"}
        return report

    def _wait(self, phase: int) -> float:
        """Seconds to wait for a partner: one that waits in vain in an earlier phase comes that much later to the next."""
        return self.timeout / 2 * 2**phase

    def _gather(self, store: dist.Store) -> list[int]:
        """The ranks that came, the same list on every node: the first node waits for all of them, but not longer than the time-out."""
        store.set(f"here/{self.rank}", "1")
        if self.rank == 0:
            store.set("present", json.dumps(self._arrived(store, "here", range(self.nodes), self.timeout)))
        store.wait(["present"], timedelta(seconds=self.timeout + 10))
        return json.loads(store.get("present"))

    def _arrived(self, store: dist.Store, key: str, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those of the ranks that set their key in time."""
        missing, deadline = list(ranks), time.monotonic() + seconds
        came = []
        while missing and time.monotonic() < deadline:
            now = [rank for rank in missing if store.check([f"{key}/{rank}"])]
            came += now
            missing = [rank for rank in missing if rank not in now]
            time.sleep(0.02)
        return sorted(came)

    def _pairs(self, present: list[int]) -> list[tuple[int, tuple[int, int]]]:
        """(phase, pair) of the pairs that this node is in, in the order in which every node takes them.

        No node is in two pairs of a phase: even places of the ring with the next, odd ones with the next, and of an odd
        number of nodes the last with the first.
        """
        count, here = len(present), present.index(self.rank)
        if count < 2:
            return []
        lefts = {here, (here - 1) % count} if count > 2 else {0}
        phases = {left: 2 if left == count - 1 and count % 2 else left % 2 for left in lefts}
        return sorted((phase, (present[left], present[(left + 1) % count])) for left, phase in phases.items())

    def _skew(self, store: dist.Store, present: list[int]) -> float | None:
        """This clock minus the first node's, by one request and its answer: right to half a round trip. All of them are there now."""
        seconds = self.timeout / 4
        if self.rank == 0:
            asking, deadline = [rank for rank in present if rank != 0], time.monotonic() + seconds
            while asking and time.monotonic() < deadline:
                for rank in [rank for rank in asking if store.check([f"ask/{rank}"])]:
                    store.set(f"clock/{rank}", str(time.time()))
                    asking.remove(rank)
            return 0.0
        before = time.time()
        store.set(f"ask/{self.rank}", "1")
        if not self._await(store, f"clock/{self.rank}", seconds):
            return None
        after = time.time()
        answer = float(store.get(f"clock/{self.rank}"))
        return 0.0 if before <= answer <= after else (before - answer if before > answer else after - answer)

    def _await(self, store: dist.Store, key: str, seconds: float) -> bool:
        try:
            store.wait([key], timedelta(seconds=seconds))
        except (dist.DistError, RuntimeError):
            return False
        return True

    def _all_reduce(self, store: dist.Store, pair: tuple[int, int], seconds: float, cuda: bool) -> tuple[float | None, str]:
        """GB/s of an all-reduce between two nodes: bytes / seconds, which for two ranks is also the bus bandwidth."""
        wait = timedelta(seconds=seconds)
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
