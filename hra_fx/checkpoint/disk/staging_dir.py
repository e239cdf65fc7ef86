"""The unfinished result, in a hidden folder beside the wanted one: taken up again by a later call, renamed at the end.

`.<name>.partial/` holds `content/`, in which every file is whole and on the disk; `part`, the one that is being
written; `inputs.json`, what all is made from; `done.json`, what is to be told of finished files; and `replaced/`, for
an instant, the folder that makes room. `.<name>.gone/` is what it is called while it is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hra_fx.errors import CheckpointError


class Partial:
    """The unfinished result of one call.

    Attributes:
        folder: the hidden folder.
        content: what becomes the result.
        finished: name of a file -> notes of it, see `finish`.
    """

    def __init__(self, out: Path) -> None:
        """For a folder that is wanted; nothing is made yet."""
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.content = self.folder / "content"
        self._part = self.folder / "part"
        self._inputs = self.folder / "inputs.json"
        self._done = self.folder / "done.json"
        self._replaced = self.folder / "replaced"
        self._gone = self.folder.with_suffix(".gone")
        self._exchanging = False
        self.finished: dict[str, dict[str, float]] = {}

    @property
    def left(self) -> list[Path]:
        """Those that are there."""
        return [folder for folder in (self.folder, self._gone) if os.path.isdir(folder)]

    @property
    def is_done(self) -> bool:
        """Whether this call has made the content the wanted folder."""
        return self._exchanging and not self.content.exists()

    @contextlib.contextmanager
    def held(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Take it up where it was made from the same `inputs`, else begin anew; for one process at a time.

        Raises:
            CheckpointError: another process is at it.
        """
        # For the user alone: what is in it may be of a folder that is.
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with _lock(self.folder):
            self._recover()
            if not self._is_of(inputs):
                # In this order, so that what is there without content has been published.
                for left in (self._inputs, self._done, self.content):
                    remove(left)
                self.content.mkdir()
                self._write_json(self._inputs, inputs)
            remove(self._part)
            self.finished = self._notes()
            yield

    def is_published(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call with these inputs was stopped between its last step and tidying up; its notes are read."""
        published = self._is_of(inputs) and not self.content.exists() and self.out.is_dir()
        if published:
            self.finished = self._notes()
        return published

    def finish(self, name: str, notes: Mapping[str, float]) -> None:
        """Remember of a file that it is there, and what is to be told of it."""
        self.finished[name] = dict(notes)
        self._write_json(self._done, self.finished)

    def has(self, name: str, size: int) -> bool:
        """Whether a file is there; it has its name only once it is whole."""
        file = self.content / name
        return file.is_file() and file.stat().st_size == size

    def write(self, file: Path, fill: Callable[[BinaryIO], object], mode: int | None = None) -> None:
        """Make a file: it is on the disk, with all that `fill` writes, before it gets its name."""
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self._part, "wb", buffering=0) as stream:
                fill(stream)
                os.fsync(stream.fileno())
            if mode is not None:
                self._part.chmod(mode)
            os.replace(self._part, file)
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise

    def publish(self) -> None:
        """Make the content the wanted folder."""
        for folder, _, _ in os.walk(self.content):
            _sync(Path(folder))
        self._exchanging = True
        try:
            if self.out.is_dir():
                os.replace(self.out, self._replaced)
            os.replace(self.content, self.out)
        except BaseException:
            self._recover()
            raise
        _sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove all that is unfinished: it is gone at one blow, for half of it would say less than nothing."""
        if self._replaced.exists() and not self.out.exists():
            os.replace(self._replaced, self.out)
        self.tidy()
        os.replace(self.folder, self._gone)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a call had no time to remove."""
        remove(self._gone)

    def _recover(self) -> None:
        """Put back what was making room when the process was stopped, or remove it where all was done."""
        if self._replaced.exists() and not self.out.exists():
            os.replace(self._replaced, self.out)
        remove(self._replaced)

    def _notes(self) -> dict[str, dict[str, float]]:
        notes: dict[str, dict[str, float]] = {}
        if self._done.is_file():
            notes = json.loads(self._done.read_text(encoding="utf-8"))
        return notes

    def _is_of(self, inputs: Mapping[str, Any]) -> bool:
        return self._inputs.is_file() and self._inputs.read_text(encoding="utf-8") == _text(inputs)

    def _write_json(self, file: Path, entries: Mapping[str, Any]) -> None:
        self.write(file, lambda stream: stream.write(_text(entries).encode()))


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _text(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, indent=1, sort_keys=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Have the folder for this process alone, where the system can tell; a process that is killed lets go of it."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    file = folder / "lock"
    with open(file, "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(stream.fileno()), file.stat())
        except OSError:
            free = False
        if not free:
            raise CheckpointError(f"{folder}: another process writes into it. Wait for that one, or stop it.")
        yield


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk, where folders can be opened."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
