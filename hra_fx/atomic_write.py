"""Write files atomically: a reader sees the old file or the complete new one, never a part of it."""

from __future__ import annotations

import contextlib
import glob
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

#: The bytes of a file, or a function that writes them to the file of a path.
Content: TypeAlias = bytes | Callable[[Path], object]
_DAY = 24 * 60 * 60


@contextlib.contextmanager
def temporary_file(target: Path, content: Content) -> Iterator[Path]:
    """Write a complete file to disk next to `target`. On exit, it is removed if it was not renamed.

    It is opened like any other file, so its permissions follow the umask. Files that killed processes left more than a
    day ago are removed; newer ones may be those of another process.
    """
    for old in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if time.time() - old.stat().st_mtime > _DAY:
                old.unlink()
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        with open(path, "rb") as stream:  # from the memory of the operating system to disk
            os.fsync(stream.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def atomic_write(target: Path, content: Content) -> None:
    """Write a file under a temporary name, then rename it. On error the old file is unchanged."""
    with temporary_file(target, content) as new:
        os.replace(new, target)
