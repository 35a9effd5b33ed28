"""Progress of a long copy, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Lines on stderr: share written, rate, time left."""

    def __init__(self, total: int, interval: float = 5.0) -> None:
        self._total, self._interval, self._done = total, interval, 0
        self._start = self._last = time.monotonic()

    def __call__(self, written: int) -> None:
        self._done += written
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            print(f"{100 * self._done / self._total:5.1f} %, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True)
