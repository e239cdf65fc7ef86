"""The unfinished result: a hidden folder next to the output folder, which can be resumed and is renamed at the end.

`.<name>.partial/` holds `content/`, where every file is complete and on disk; `part`, the file being written;
`inputs.json`, what the result is made from; and, for a moment, `replaced/`, the old output folder. `content/` exists
until it becomes the output folder.
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
        out: the output folder.
        folder: the hidden folder.
        content: what becomes the result.
        is_done: whether this call has renamed the content to the output folder.
    """

    def __init__(self, out: Path) -> None:
        """Nothing is created yet."""
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.content = self.folder / "content"
        self.is_done = False
        self._part, self._inputs, self._replaced, self._lock = (
            self.folder / name for name in ("part", "inputs.json", "replaced", "lock")
        )

    @contextlib.contextmanager
    def locked(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Create the folder, or resume it if it has the same `inputs`; for one process at a time.

        Raises:
            CheckpointError: another process uses the folder.
        """
        # Readable by the user alone, since the base may be.
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with _lock(self._lock):
            self._recover()
            text = json.dumps(inputs, indent=1, sort_keys=True)
            if not (self.content.is_dir() and self._inputs.is_file() and self._inputs.read_text("utf-8") == text):
                # The inputs go first and come last: content without inputs is not resumed.
                for path in (self._inputs, self.content):
                    remove(path)
                self.content.mkdir()
                self.write(self._inputs, text.encode())
            remove(self._part)
            yield

    def has(self, name: str) -> bool:
        """Whether a file is complete."""
        return (self.content / name).is_file()

    def write(self, file: Path, content: Content, mode: int | None = None) -> None:
        """Write a file atomically. The temporary file is in a known place, where the next call finds and removes it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content, mode=mode, temporary=self._part)

    def publish(self) -> None:
        """Rename the content to the output folder."""
        for folder, _, _ in os.walk(self.content):
            _sync(Path(folder))
        try:
            if self.out.is_dir():
                os.replace(self.out, self._replaced)
            os.replace(self.content, self.out)
        except BaseException:
            self.is_done = not self.content.exists()
            self._recover()
            raise
        self.is_done = True
        _sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Delete the folder, the inputs first: without them, a partly deleted folder is not resumed."""
        self._recover()
        for path in (self._inputs, self._part, self.content, self._lock):
            remove(path)
        # Another call may have started in the folder once the lock was gone.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _recover(self) -> None:
        """Restore the old output folder if a call was stopped while renaming; delete it if the renaming was done."""
        if self._replaced.exists() and self.content.exists() and not self.out.exists():
            os.replace(self._replaced, self.out)
        remove(self._replaced)


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Lock a file for this process, where the system can; the lock of a killed process is released."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(file, "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(stream.fileno()), file.stat())
        except OSError:
            free = False
        if not free:
            raise CheckpointError(f"{file.parent}: in use by another process. Wait until it has finished, or stop it.")
        yield


def _sync(folder: Path) -> None:
    """Flush the names in a folder to disk, where folders can be opened."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
