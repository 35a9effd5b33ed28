"""A real HTTP server of a folder on the loopback interface that can be told to fail."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Faults:
    """What goes wrong, by file name: a list of "status", "cut" and "flip", one a request; afterwards all goes well."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    def next(self, name: str) -> str | None:
        with self._lock:
            self.requests[name] += 1
            left = self.by_name.get(name, [])
            return left.pop(0) if left else None


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, faults: Faults, **named: object) -> None:
        self.faults = faults
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        fault = self.faults.next(name)
        file = Path(self.translate_path(self.path))
        if fault == "status" or not file.is_file():
            self.send_error(503 if fault else 404)
            return
        data = bytearray(file.read_bytes())
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        if fault == "flip":
            data[len(data) // 2] ^= 1
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Faults]]:
    """(URL of the folder, its faults) while the server runs."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder), faults=faults))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
