"""An HTTP server of a folder on this machine whose answers together take at most so many MB a second: a link of known speed."""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

EPILOG = """example:
  python -m benchmarks.http_link data/code --mb-per-second 100"""
_BLOCK = 64 << 10


class Link:
    """rate: bytes a second of all connections together; None: as fast as it goes."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._free, self._lock = rate, 0.0, threading.Lock()

    def wait(self, size: int) -> None:
        """Return when ``size`` bytes have had their time on the link."""
        if self._rate is None:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, link: Link, **named: Any) -> None:
        self._link = link
        super().__init__(*arguments, **named)

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        """A file's content, at the link's pace."""
        while block := source.read(_BLOCK):
            self._link.wait(len(block))
            outputfile.write(block)

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


def main(argv: list[str] | None = None) -> int:
    """Serve until the process is ended; prints the URL first."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_link", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what is served")
    parser.add_argument("--mb-per-second", type=float, help="of all connections together (default: no limit)")
    options = parser.parse_args(argv)
    link = Link(options.mb_per_second and 1e6 * options.mb_per_second)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=options.folder, link=link))
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
