"""The unfinished result: a hidden folder next to the output folder, which can be resumed and is renamed at the end.

`.<name>.partial/` holds `content/`, where every file is complete and on disk; `part`, the file being written;
`inputs.json`, what the result is made from; `done.json`, notes about finished files; and, for a moment, `replaced/`,
the old output folder. `.<name>.gone/` is the same folder while it is being deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hra_fx.atomic_write import Content, atomic_write
from hra_fx.errors import CheckpointError


class StagingDir:
    """The unfinished result of one call.

    Attributes:
        folder: the hidden folder.
        content: what becomes the result.
        finished: name of a file -> its notes, see `finish`.
    """

    def __init__(self, out: Path) -> None:
        """Nothing is created yet."""
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.content = self.folder / "content"
        self._part = self.folder / "part"
        self._inputs = self.folder / "inputs.json"
        self._done = self.folder / "done.json"
        self._replaced = self.folder / "replaced"
        self._trash = self.folder.with_suffix(".gone")
        self._publishing = False
        self.finished: dict[str, dict[str, float]] = {}

    @property
    def leftovers(self) -> list[Path]:
        """Hidden folders that exist."""
        return [folder for folder in (self.folder, self._trash) if os.path.isdir(folder)]

    @property
    def is_done(self) -> bool:
        """Whether this call has renamed the content to the output folder."""
        return self._publishing and not self.content.exists()

    @contextlib.contextmanager
    def locked(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Create the folder, or resume it if it has the same `inputs`; for one process at a time.

        Raises:
            CheckpointError: another process uses the folder.
        """
        # Readable by the user alone, since the base may be.
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with _lock(self.folder):
            self._recover()
            if not self._has_inputs(inputs):
                # In this order, since inputs without content mean that the result was published.
                for path in (self._inputs, self._done, self.content):
                    remove(path)
                self.content.mkdir()
                self._write_json(self._inputs, inputs)
            remove(self._part)
            self.finished = self._read_notes()
            yield

    def is_published(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call with these inputs was stopped after publishing its result; reads its notes."""
        published = self._has_inputs(inputs) and not self.content.exists() and self.out.is_dir()
        if published:
            self.finished = self._read_notes()
        return published

    def finish(self, name: str, notes: Mapping[str, float]) -> None:
        """Record that a file is complete, with notes for the report."""
        self.finished[name] = dict(notes)
        self._write_json(self._done, self.finished)

    def has(self, name: str, size: int) -> bool:
        """Whether a file is complete."""
        file = self.content / name
        return file.is_file() and file.stat().st_size == size

    def write(self, file: Path, content: Content, mode: int | None = None) -> None:
        """Write a file atomically. The temporary file is in a known place, where the next call finds and removes it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content, mode=mode, temporary=self._part)

    def publish(self) -> None:
        """Rename the content to the output folder."""
        for folder, _, _ in os.walk(self.content):
            _sync(Path(folder))
        self._publishing = True
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
        """Delete the folder. It is renamed first, so that a partial delete is never mistaken for a result."""
        if self._replaced.exists() and not self.out.exists():
            os.replace(self._replaced, self.out)
        self.cleanup()
        os.replace(self.folder, self._trash)
        self.cleanup()

    def cleanup(self) -> None:
        """Delete what an earlier call did not get to delete."""
        remove(self._trash)

    def _recover(self) -> None:
        """Restore the old output folder if a call was stopped while renaming; delete it if the renaming was done."""
        if self._replaced.exists() and not self.out.exists():
            os.replace(self._replaced, self.out)
        remove(self._replaced)

    def _read_notes(self) -> dict[str, dict[str, float]]:
        notes: dict[str, dict[str, float]] = {}
        if self._done.is_file():
            notes = json.loads(self._done.read_text(encoding="utf-8"))
        return notes

    def _has_inputs(self, inputs: Mapping[str, Any]) -> bool:
        return self._inputs.is_file() and self._inputs.read_text(encoding="utf-8") == _to_json(inputs)

    def _write_json(self, file: Path, entries: Mapping[str, Any]) -> None:
        self.write(file, _to_json(entries).encode())


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_json(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, indent=1, sort_keys=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock the folder for this process, where the system can; the lock of a killed process is released."""
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
            raise CheckpointError(f"{folder}: in use by another process. Wait until it has finished, or stop it.")
        yield


def _sync(folder: Path) -> None:
    """Flush the names in a folder to disk, where folders can be opened."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
