"""A second home for checkpoints: any place that fsspec reaches (s3://, gs://, file://, ...), laid out as the local folder is.

Object stores have no rename, so COMPLETE, which holds the manifest's hash, is written last and removed first. What was uploaded is
read back and hashed before COMPLETE is written; what is downloaded is hashed before it gets its name.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from swax_megatron.checkpoint.folder import COMPLETE, MANIFEST, doomed_steps, fsync_folder, publish, read_manifest, write_file
from swax_megatron.checkpoint.ranks import error_text, together
from swax_megatron.checkpoint.reader import Checkpoint, from_manifest, open_checkpoint
from swax_megatron.checkpoint.tensorfile import BLOCK, DurableWriter
from swax_megatron.errors import RunError

_STEP = re.compile(r"step_(\d+)")
_ATTEMPTS, _PAUSE = 3, 1.0  # seconds before the second attempt, doubled for each further one
_log = logging.getLogger(__name__)
T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether a path is a URL rather than a folder of this machine."""
    return "://" in path


class Remote:
    """The checkpoints ``URL/step_N``. Any thread may use it."""

    def __init__(self, url: str) -> None:
        """Raises ValueError where fsspec does not know the URL's kind or lacks the package for it."""
        self.url = url.rstrip("/")
        try:
            self._fs: AbstractFileSystem
            self._fs, self._root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"checkpoint.remote={url!r}: fsspec cannot reach it ({error})") from error
        self._root = self._root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def check_writable(self) -> None:
        """Write and delete a small file; ValueError where that fails. For the start of a run, before hours are spent."""
        path = f"{self._root}/.probe-{secrets.token_hex(4)}"
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(path, b"")
            self._fs.rm_file(path)
        except Exception as error:  # every kind of store has errors of its own
            raise ValueError(f"checkpoint.remote={self.url!r} cannot be written ({error_text(error)}): check address and rights") from error

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete, ascending."""
        return [step for step in self.folders() if self._manifest(step) is not None]

    def folders(self) -> list[int]:
        """Steps of which anything is there, ascending: complete, damaged, or on their way."""
        try:
            self._fs.invalidate_cache()
            names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def newest(self, above: int = -1) -> int:
        """The newest complete step beyond ``above``, -1 where there is none.

        Raises ValueError where a newer one is damaged: COMPLETE is written last and removed first, so where it is there, and does not
        hold the manifest's hash, something was changed. What has no COMPLETE is an upload that was cut off and does not count.
        """
        for step in reversed(self.folders()):
            if step <= above:
                break
            if self._manifest(step) is not None:
                return step
            if self._fs.exists(self._path(step, COMPLETE)):
                raise ValueError(
                    f"{self.url}/step_{step} is damaged (the hash of {MANIFEST} is not the one in {COMPLETE}): "
                    "move it away to use an older one"
                )
        return -1

    def open(self, step: int) -> Checkpoint:
        """The manifest of a step, for looking at; tensors need ``download``. ValueError where it is not complete."""
        text = self._manifest(step)
        if text is None:
            raise ValueError(f"{self._path(step)} holds no complete checkpoint")
        return from_manifest(Path(f"step_{step}"), text)

    def upload(self, path: Path, ranks: Any) -> None:
        """Copy a complete local checkpoint. Collective: the ranks share its files. RunError on every rank where it fails."""
        sentence = f"checkpoint {path.name} was not copied to {self.url}"
        checkpoint, text = together(ranks, lambda: (open_checkpoint(path), read_manifest(path)), sentence)
        step = checkpoint.step

        def begin() -> None:
            if ranks.rank == 0:
                self._fs.makedirs(self._path(step), exist_ok=True)
                self._remove_file(step, COMPLETE)  # of an older checkpoint of the same step

        def share() -> None:
            for name in sorted(checkpoint.files)[ranks.rank :: ranks.size]:
                self._again(lambda name=name: self._put(path / name, step, name, checkpoint.files[name]["sha256"]))

        def end() -> None:
            if ranks.rank == 0:
                self._again(lambda: self._fs.pipe_file(self._path(step, MANIFEST), text))
                self._again(lambda: self._fs.pipe_file(self._path(step, COMPLETE), hashlib.sha256(text).hexdigest().encode() + b"\n"))

        for part in (begin, share, end):
            together(ranks, part, sentence)

    def download(self, step: int, root: Path, ranks: Any) -> Path:
        """Bring a checkpoint to ``root/step_N``. Collective: the ranks share its files. RunError on every rank where it fails,
        or a file differs from its hash.
        """
        sentence = f"checkpoint step_{step} could not be fetched from {self.url}"
        checkpoint = together(ranks, lambda: self.open(step), sentence)
        name = ranks.broadcast(f"step_{step}.tmp-{secrets.token_hex(6)}" if ranks.rank == 0 else None)
        temporary = root / name

        def share() -> None:
            temporary.mkdir(parents=True, exist_ok=True)
            for file in sorted(checkpoint.files)[ranks.rank :: ranks.size]:
                self._get(step, file, temporary / file, checkpoint.files[file]["sha256"])

        def end() -> None:
            if ranks.rank == 0:
                text = self._manifest(step)
                if text is None:
                    raise RunError(f"{self._path(step)} was removed meanwhile")
                write_file(temporary / MANIFEST, text)
                fsync_folder(temporary)
                write_file(temporary / COMPLETE, hashlib.sha256(text).hexdigest().encode() + b"\n")
                fsync_folder(temporary)
                publish(temporary, root / f"step_{step}")

        try:
            for part in (share, end):
                together(ranks, part, sentence)
        except RunError:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return root / f"step_{step}"

    def verify(self, step: int, progress: Callable[[int], None] | None = None) -> int:
        """Read every byte of a step and compare with the manifest; returns the bytes. ValueError naming every damaged file."""
        checkpoint, problems = self.open(step), []
        for name, entry in sorted(checkpoint.files.items()):
            try:
                if self._hash(step, name, progress) != entry["sha256"]:
                    problems.append(f"{name} has another sha256 than when it was saved")
            except FileNotFoundError:
                problems.append(f"{name} is missing")
        if problems:
            raise ValueError(f"checkpoint {self._path(step)} is damaged: {'; '.join(problems)}")
        return sum(entry["bytes"] for entry in checkpoint.files.values())

    def prune(self, keep_last: int, keep_every: int = 0) -> list[int]:
        """Delete all but the newest ``keep_last`` complete checkpoints (0: keep all) and the milestones; returns the steps removed."""
        doomed = doomed_steps(self.steps(), keep_last, keep_every)
        for step in doomed:
            self.remove(step)
        return doomed

    def remove(self, step: int) -> None:
        """Delete one checkpoint, its marker first."""
        self._remove_file(step, COMPLETE)
        self._fs.rm(self._path(step), recursive=True)

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/step_{step}" + (f"/{name}" if name else "")

    def _manifest(self, step: int) -> bytes | None:
        """The manifest's text where COMPLETE holds its hash."""
        try:
            marker = self._fs.cat_file(self._path(step, COMPLETE)).strip()
            text = self._fs.cat_file(self._path(step, MANIFEST))
        except FileNotFoundError:
            return None
        return text if marker == hashlib.sha256(text).hexdigest().encode() else None

    def _remove_file(self, step: int, name: str) -> None:
        try:
            self._fs.rm_file(self._path(step, name))
        except FileNotFoundError:
            pass

    def _blocks(self, step: int, name: str) -> Iterator[bytes]:
        with self._fs.open(self._path(step, name), "rb", block_size=BLOCK) as file:
            while block := file.read(BLOCK):
                yield block

    def _hash(self, step: int, name: str, progress: Callable[[int], None] | None = None) -> str:
        digest = hashlib.sha256()
        for block in self._blocks(step, name):
            digest.update(block)
            if progress is not None:
                progress(len(block))
        return digest.hexdigest()

    def _put(self, source: Path, step: int, name: str, sha256: str) -> None:
        self._fs.put_file(str(source), self._path(step, name))
        if self._hash(step, name) != sha256:
            raise RunError(f"{self._path(step, name)} does not read back as {source}")

    def _get(self, step: int, name: str, target: Path, sha256: str) -> None:
        def attempt() -> None:
            target.unlink(missing_ok=True)
            with DurableWriter(target) as file:
                for block in self._blocks(step, name):
                    file.write(block)
            if file.sha256 != sha256:
                raise RunError(f"{self._path(step, name)} has another sha256 than when it was saved")

        self._again(attempt)

    @staticmethod
    def _again(action: Callable[[], T]) -> T:
        """Networks fail for moments: a few attempts, each said in the log."""
        pause = _PAUSE
        for attempt in range(1, _ATTEMPTS):
            try:
                return action()
            except Exception as error:  # every kind of store has errors of its own; the last attempt's is raised
                _log.warning("attempt %d of %d: %s", attempt, _ATTEMPTS, error_text(error))
            time.sleep(pause)
            pause *= 2
        return action()
