"""A thread beside training that ends a hung job in bounded time and says which rank did not arrive.

Once a second every rank leaves a heartbeat in the job's TCPStore: where its training thread stands, whether it waits in a
collective, whether it is over its limit (``Progress.limit``). A rank that is over its limit looks at the heartbeats twice.
It calls a hang where a rank is silent (stopped, dead, or holding the interpreter's lock), where the rank that the others
wait for is over its own limit, or where nobody is behind; a rank that waits for one that is busy within its limit waits on.
Then every rank that still has a heart writes its Python stacks and the flight recorder's trace, the caller writes the
report, and all leave with exit code 76 (``os._exit``: the training thread may be stuck for good): less than
``3 x BEAT + GATHER`` seconds after the limit. Stacks of a rank whose lock is held are written by faulthandler's own thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from swax_megatron.errors import ExitCode
from swax_megatron.resilience.events import Events
from swax_megatron.resilience.progress import OVER, Progress

BEAT = 1.0  # seconds between heartbeats
GATHER = 3.0  # between two looks at the heartbeats: one that did not change is silent
LEAVE = 3.0  # at most, for the report to be written before the others leave
ORDER = ("data", "compute", "update")  # sections of a step; others come after it


class Watchdog(threading.Thread):
    """Watches the training thread that creates it."""

    def __init__(self, progress: Progress, limits: tuple[float, float, float, float], run_dir: str | Path, events: Events) -> None:
        """limits: factor, minimum, unknown and ceiling of ``Progress.limit``."""
        super().__init__(name="watchdog", daemon=True)
        self.progress, self.limits, self.events = progress, limits, events
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.folder = Path(run_dir) / "hangs" / f"attempt_{events.attempt}"
        self.watched = threading.get_ident()
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.store = own_connection()
        self.prefix = f"swax/attempt_{events.attempt}"
        self.neighbours: dict[int, psutil.Process] = {}  # the other ranks of this node, as far as they left a heartbeat
        self.beats = 0
        self.done = threading.Event()
        self.locked_out: Any = None
        self.beat()  # before anything can go wrong: a report names every rank's host and process
        self._arm(min(limits[2:]) + 3 * BEAT + GATHER)

    def run(self) -> None:
        while not self.done.wait(BEAT):
            if self.parent is not None and os.getppid() != self.parent:
                leave(ExitCode.CRASHED, f"rank {self.rank}: the process that started it is gone")
            mark = self.progress.mark
            if mark.section == OVER:
                return self.stop()
            limit = self.progress.limit(mark, *self.limits)
            call = f"{mark.section} of step {mark.step} takes longer than {limit:.0f} s"
            over = time.monotonic() - mark.since > limit
            try:
                self.beat(over)
                gone = self._gone() if mark.section in ORDER else []
                if self.store.check([f"{self.prefix}/hang"]):
                    self.end()
                if gone and self.progress.mark.order == mark.order:
                    leave(ExitCode.CRASHED, f"rank {self.rank}: rank(s) {names(gone, {})} of this node ended within a step")
                if over:
                    self.judge(call)
            except RuntimeError as error:  # the store's host is gone, or slow
                if over:
                    self.call(f"{call}, and the job's store does not answer ({error})", {}, {})
            self._arm(limit + 3 * BEAT + GATHER)

    def stop(self) -> None:
        """Before the process groups are taken down."""
        self.done.set()
        if threading.current_thread() is not self:
            self.join(BEAT + 5)
        faulthandler.cancel_dump_traceback_later()
        if self.locked_out is not None:
            self.locked_out.close()
            Path(self.locked_out.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's file, or a hang's report
                self.folder.parent.rmdir()
            self.locked_out = None

    def beat(self, over: bool = False) -> None:
        """Leave a heartbeat."""
        self.beats += 1
        mark = self.progress.mark
        beat = {"beat": self.beats, "section": mark.section, "step": mark.step, "waits": self._waits(over), "over": over}
        self.store.set(f"{self.prefix}/{self.rank}", json.dumps({**beat, "host": socket.gethostname(), "pid": os.getpid()}))

    def judge(self, call: str) -> None:
        """This rank is over its limit: look, look again, and call a hang unless it only waits for a rank that is busy.

        call: what this rank sees, for people
        """
        before, mark = self.heartbeats(), self.progress.mark
        for _ in range(round(GATHER / BEAT)):
            if self.done.wait(BEAT):
                return
            self.beat(True)  # others look at this rank, too
        after = self.heartbeats()
        if self.progress.mark.order != mark.order:
            return  # it went on
        silent, behind = missing(before, after, self.size)
        if silent or not behind or any(after[rank]["over"] for rank in behind):
            self.call(call, before, after)

    def call(self, call: str, before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> None:
        """Tell every rank, write the report (the first caller), leave."""
        first = True
        with contextlib.suppress(RuntimeError):
            first = self.store.add(f"{self.prefix}/hang", 1) == 1
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            sentence = self.report(call, before, after)
            print(sentence, file=sys.stderr, flush=True)
            with contextlib.suppress(RuntimeError):
                self.store.set(f"{self.prefix}/reported", sentence)
            return self.end(told=True)
        self.end()

    def end(self, told: bool = False) -> None:
        """Write this rank's traces and leave, when the report is written. Every rank's log gets the report's sentence."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_stacks()
        recorder = threading.Thread(target=self._write_flight_recorder, daemon=True)
        recorder.start()
        recorder.join(1.0)
        deadline = time.monotonic() + LEAVE
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self.store.check([f"{self.prefix}/reported"]):
                time.sleep(0.1)
            if not told and self.store.check([f"{self.prefix}/reported"]):
                print(self.store.get(f"{self.prefix}/reported").decode(), file=sys.stderr, flush=True)
        leave(ExitCode.HUNG)

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """The last heartbeat of every rank that left one."""
        keys = {rank: f"{self.prefix}/{rank}" for rank in range(self.size)}
        there = [rank for rank, key in keys.items() if self.store.check([key])]
        return {rank: json.loads(self.store.get(keys[rank])) for rank in there}

    def report(self, call: str, before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> str:
        """report.json and two events; the sentence to tell."""
        silent, behind = missing(before, after, self.size)
        if silent:
            who = f"no heartbeat from rank(s) {names(silent, after or before)}: stopped, dead, or holding the interpreter's lock"
        elif behind:
            who = f"rank(s) {names(behind, after)} did not arrive"
        else:
            who = "every rank is alive and none is behind: see the stacks"
        beats = {str(rank): after[rank] for rank in sorted(after)}
        verdict = {"call": call, "caller": self.rank, "silent": silent, "behind": behind, "heartbeats": beats}
        (self.folder / "report.json").write_text(json.dumps(verdict, indent=1), encoding="utf-8")
        self.events.write("hang", call=call, silent=silent, behind=behind, traces=str(self.folder))
        self.events.write("end", code=int(ExitCode.HUNG))
        return f"error: hang: {call}; {who}. Stacks of every rank: {self.folder}"

    def _waits(self, over: bool) -> bool:
        """Whether any thread but this one stands in a torch.distributed call, or in Megatron's exchange between stages.

        Over NCCL no call waits: the rank stands where it next reads a value from the GPU. So a rank that is over its limit also
        waits where a collective that it began is not done.
        """
        if over and _nccl_under_way():
            return True
        frames = [frame for ident, frame in sys._current_frames().items() if ident != self.ident]
        for frame in frames:
            while frame is not None:
                if any(part in frame.f_code.co_filename for part in ("torch/distributed/", "p2p_communication")):
                    return True
                frame = frame.f_back
        return False

    def _gone(self) -> list[int]:
        """The other ranks of this node whose processes have ended.

        gloo's transfers fail when a peer dies. NCCL's, inside a node, wait on for ever, and with them this rank's training thread.
        """
        if self.parent is None:
            return []
        first = self.rank - int(os.environ["LOCAL_RANK"])
        others = set(range(first, first + int(os.environ["LOCAL_WORLD_SIZE"]))) - {self.rank}
        gone = []
        for rank in sorted(others):
            try:
                if rank not in self.neighbours and self.store.check([key := f"{self.prefix}/{rank}"]):
                    self.neighbours[rank] = psutil.Process(json.loads(self.store.get(key))["pid"])
                process = self.neighbours.get(rank)
                if process and (not process.is_running() or process.status() == psutil.STATUS_ZOMBIE):
                    gone.append(rank)
            except psutil.NoSuchProcess:
                gone.append(rank)
        return gone

    def _write_stacks(self) -> None:
        with (self.folder / f"rank_{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _write_flight_recorder(self) -> None:
        """The last collectives of every backend, as many as TORCH_FR_BUFFER_SIZE says."""
        for name, recorder in (("nccl_collectives", "_dump_nccl_trace_json"), ("collectives", "_dump_fr_trace_json")):
            if dump := getattr(c10d, recorder, None):
                (self.folder / f"rank_{self.rank:05d}_{name}.json").write_bytes(dump())

    def _arm(self, seconds: float) -> None:
        """Let faulthandler's own thread, which needs no lock of the interpreter, write the stacks and exit if this one cannot."""
        if self.locked_out is None:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.locked_out = (self.folder.parent / f"attempt_{self.events.attempt}_rank_{self.rank:05d}_locked.txt").open("w")
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.locked_out)


def missing(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], size: int) -> tuple[list[int], list[int]]:
    """Who does not answer between two looks at the heartbeats, and, of those that do, who is behind the others.

    Behind are the ranks at the lowest (step, section); where all stand in the same, those that wait in no collective.
    """
    silent = [rank for rank in range(size) if rank not in after or after[rank]["beat"] == before.get(rank, {}).get("beat")]
    places = {rank: (beat["step"], _order(beat["section"]), beat["waits"]) for rank, beat in after.items() if rank not in silent}
    lowest = min(places.values(), default=None)
    behind = [rank for rank, place in places.items() if place == lowest]
    return silent, behind if len(behind) < len(places) else []


def _nccl_under_way() -> bool:
    """Whether a collective of this process over NCCL has not ended, as torch's flight recorder knows."""
    dump = getattr(c10d, "_dump_nccl_trace_json", None)  # absent from builds without NCCL
    return dump is not None and bool(json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries"))


def _order(section: str) -> int:
    return ORDER.index(section) if section in ORDER else len(ORDER)


def names(ranks: list[int], beats: dict[int, dict[str, Any]]) -> str:
    """Ranks with host, process and place, at most eight."""
    told = []
    for rank in ranks[:8]:
        beat = beats.get(rank)
        told.append(f"{rank} ({beat['host']}, pid {beat['pid']}, {beat['section']} of step {beat['step']})" if beat else str(rank))
    return ", ".join(told) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def own_connection() -> dist.TCPStore:
    """A connection of its own to the job's store: the training thread may hold the other one."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=3))


def leave(code: ExitCode, sentence: str = "") -> None:
    """End the process from this thread, whatever the others do."""
    if sentence:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(code)
