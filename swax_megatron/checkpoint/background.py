"""Saves in the background: a thread copies the state to host memory, writes, fsyncs, reads back and publishes.

The copy runs beside the next step's forward and backward passes, which change no master weight and no moment; only the next
update waits for it (``copied``). The threads of the ranks meet through files (``mail.py``), never through process groups. At most
one save is in flight: the next one, and whoever leaves, waits for it with ``finish``.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from swax_megatron.checkpoint.mail import Mail
from swax_megatron.checkpoint.ranks import Ranks
from swax_megatron.checkpoint.snapshot import Snapshot
from swax_megatron.checkpoint.writer import Fragment, save_among
from swax_megatron.errors import RunError

_log = logging.getLogger(__name__)

Then = Callable[[Path, Any], None]


class BackgroundSaver:
    """One a process, kept for the whole run: it owns the host memory that snapshots go to (as much as the fragments of this rank)."""

    def __init__(self, timeout: float) -> None:
        """timeout: seconds that ranks wait for each other's files."""
        self.snapshot = Snapshot()
        self.copy_seconds = 0.0  # from the newest save's start until its values were in host memory
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._mail: Mail | None = None
        self._copied = threading.Event()
        self._copied.set()

    @property
    def in_flight(self) -> bool:
        """Whether a save was started whose outcome nobody has asked for."""
        return self._thread is not None

    def start(
        self,
        root: str | Path,
        step: int,
        fragments: Iterable[Fragment],
        *,
        config: dict[str, Any],
        state: dict[str, Any],
        rank_state: dict[str, Tensor] | None = None,
        group: Any = None,
        then: Then | None = None,
    ) -> None:
        """Save behind the caller's back. Collective; arguments and result on disk as of ``save``.

        The fragments must keep their values until ``copied`` returns, and work on the GPU that makes them must be done.
        ``then(path, ranks)`` is called in the thread of every rank once the checkpoint is complete. Waits for the save before;
        raises what that one, or the copy, failed with. ``config`` and ``state`` must not be changed afterwards.
        """
        self.finish(group)
        started = time.perf_counter()
        ranks = Ranks.of(group)
        name, failure = None, None
        if ranks.rank == 0:
            name = f"step_{step}.tmp-{secrets.token_hex(6)}"  # a name that prune() clears away after a kill
            try:
                (Path(root) / name).mkdir(parents=True)
            except OSError as error:
                failure = f"checkpoint step_{step} was not saved: {error}"
        name, failure = ranks.broadcast([name, failure])
        if failure is not None:
            raise RunError(failure)
        originals = list(fragments)
        own = None if rank_state is None else {key: tensor.clone() for key, tensor in rank_state.items()}
        mail = self._mail = Mail(Path(root) / name, ranks.rank, ranks.size, self._timeout)

        def work() -> None:
            try:
                try:
                    copies = self.snapshot.take(originals)
                finally:
                    originals.clear()
                    self.copy_seconds = time.perf_counter() - started
                    self._copied.set()
                path = save_among(mail, root, step, copies, config=config, state=state, rank_state=own, read_back=True)
                if then is not None:
                    then(path, mail)
            except Exception as error:  # raised again in finish()
                self._error = error
                if mail.rank == 0:
                    _log.error("%s", error)
                return
            try:
                if mail.gather(None) is not None:  # now nobody reads the folder any more
                    shutil.rmtree(mail.folder, ignore_errors=True)
            except RunError as error:  # the checkpoint stands
                _log.warning("%s", error)

        # Not a daemon: a process that leaves for another reason than a kill still writes its checkpoint to the end.
        self._copied.clear()
        self._thread = threading.Thread(target=work, name=f"checkpoint step_{step}")
        self._thread.start()

    def copied(self) -> None:
        """Wait until the values to be saved are in host memory: from then on the originals may change. Not collective."""
        self._copied.wait()

    def finish(self, group: Any = None) -> None:
        """Wait for the save in flight. Collective; nothing happens where there is none.

        Raises on every rank, in one sentence, what it failed with: ValueError or RunError, as ``save``.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        kind = "value" if isinstance(error, ValueError) else "other"
        failures = Ranks.of(group).all_gather(None if error is None else [kind, str(error)])
        if self._mail is not None and self._mail.rank == 0:
            shutil.rmtree(self._mail.folder, ignore_errors=True)  # it is still there after a failure
        first = next((failure for failure in failures if failure is not None), None)
        if first is not None:
            raise (ValueError if first[0] == "value" else RunError)(first[1]) from error
