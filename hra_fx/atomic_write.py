"""Write files atomically: a reader sees the old file or the complete new one, never a part of it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from hra_fx.errors import VisualizeError

#: The bytes of a file, or a function that writes them to an open, unbuffered file.
Content: TypeAlias = bytes | Callable[[BinaryIO], object]


def write_all(target: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


@contextlib.contextmanager
def temporary_file(target: Path, content: Content, temporary: Path | None = None) -> Iterator[Path]:
    """A complete file on disk, to be renamed to `target`; it is removed at the end if it was not renamed.

    It is opened like any other file, so that its permissions follow the umask.

    Args:
        target: the final path.
        content: what to write.
        temporary: path of the temporary file, in the same file system. Default: a unique name next to `target`.
    """
    path = temporary or target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(path, "wb", buffering=0) as file:
            if callable(content):
                content(file)
            else:
                write_all(file, content)
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def atomic_write(target: Path, content: Content, *, mode: int | None = None, temporary: Path | None = None) -> None:
    """Write a file under a temporary name, then rename it. On error the old file is unchanged.

    Args:
        target: the path.
        content: what to write.
        mode: permissions. Default: those of a new file.
        temporary: see `temporary_file`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder, "a.txt"), b"text")
    ...     os.listdir(folder)
    ['a.txt']
    """
    with temporary_file(target, content, temporary) as new:
        if mode is not None:
            new.chmod(mode)
        os.replace(new, target)


def output_file(path: str | os.PathLike[str], formats: Collection[str], *, listed: str = "") -> Path:
    """Check the path of an output file.

    Args:
        path: as the user gave it.
        formats: supported file extensions, such as `".svg"`; case does not matter.
        listed: how the error message lists them. Default: comma-separated.

    Raises:
        VisualizeError: the extension is not supported, the folder does not exist, or the path is a folder.

    Example:
        >>> output_file("strip.gif", [".svg", ".png"])
        Traceback (most recent call last):
        hra_fx.errors.VisualizeError: path: unsupported file extension '.gif' in 'strip.gif'. Use one of .svg, .png.
    """
    file = Path(path)
    if file.suffix.lower() not in formats:
        raise VisualizeError(
            f"path: unsupported file extension {file.suffix!r} in {file.name!r}. "
            f"Use one of {listed or ', '.join(formats)}."
        )
    if not file.parent.is_dir():
        raise VisualizeError(f"path: the folder {str(file.parent)!r} does not exist. Create it, or choose another one.")
    if file.is_dir():
        raise VisualizeError(f"path: {str(file)!r} is a folder. Give the name of a file.")
    return file


def write_output_file(path: Path, data: bytes) -> None:
    """Write an output file atomically; if `path` is a symbolic link, the file that it points to is replaced.

    Raises:
        VisualizeError: the file cannot be written.
    """
    try:
        atomic_write(path.resolve(), data)
    except OSError as error:
        raise VisualizeError(
            f"path: cannot write {path} ({error}). The old file, if any, is unchanged. Choose another path."
        ) from error
