"""Forward reading of a plain, gzip or zstd file, by position in its uncompressed bytes."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 1 << 20
_WINDOW = 1 << 31  # the largest there is (zstd --long=31); such a file takes that much memory


class ByteStream:
    """``buffer`` holds the bytes from position ``base`` on; ``fill`` appends more, ``advance`` drops what is before a position.

    path: the file.  name: what errors call it. The compression is told by the first bytes, and by the ending of ``name``
    where the file must be compressed. Raises ValueError where it is damaged or cut short, OSError where it cannot be read.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        magic = self._file.read(4)
        self._file.seek(0)
        ending = name.lower().rpartition(".")[2]
        if not magic and ending in ("gz", "zst"):
            raise ValueError(f"{name} is cut short: it has 0 bytes, which no compressed file has; copy it again")
        if ending == "gz" or magic[:2] == b"\x1f\x8b":
            self._blocks: Iterator[bytes] | None = self._gzip()
        elif ending == "zst" or magic == b"\x28\xb5\x2f\xfd":
            self._blocks = _zstd(name, self._file)
        else:
            self._blocks = None
        self.base, self.buffer, self.ended = 0, b"", False
        self.mark: int | None = None  # the base is where the first record at or after this position begins

    @property
    def seekable(self) -> bool:
        """Whether any position is reached without reading what is before it."""
        return self._blocks is None

    def raw_position(self) -> int:
        """Bytes of the file read so far, compressed as they are."""
        return self._file.tell()

    def fill(self) -> bool:
        """Append a block to the buffer; False at the end of the file."""
        block = self._file.read(BLOCK) if self._blocks is None else next(self._blocks, b"")
        self.ended = not block
        self.buffer = self.buffer + block if self.buffer else block
        return not self.ended

    def advance(self, position: int) -> None:
        """Let the buffer begin at ``position`` (not before its base), or be empty where the file ends before it."""
        if self.seekable and position > self.base + len(self.buffer):
            self._file.seek(position)
            self.base, self.buffer = position, b""
            return
        while position > self.base + len(self.buffer):
            self.base, self.buffer = self.base + len(self.buffer), b""
            if not self.fill():
                return
        self.buffer, self.base = self.buffer[position - self.base :], position

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _gzip(self) -> Iterator[bytes]:
        try:
            with gzip.GzipFile(fileobj=self._file) as plain:
                while block := plain.read(BLOCK):
                    yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self.name} is damaged or cut short ({error}): copy it again") from error


def _zstd(name: str, file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader does not notice a file that was cut short."""
    import zstandard

    decoder, data = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(), b""
    inside = False
    try:
        while data := data or file.read(BLOCK // 32):
            inside = True
            if block := decoder.decompress(data):
                yield block
            data = b""
            if decoder.eof:
                data, inside = decoder.unused_data, False
                decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is damaged ({error}): copy it again") from error
    if inside:
        raise ValueError(f"{name} is cut short: copy it again")
