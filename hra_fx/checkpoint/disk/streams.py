"""Reading and writing of files without a buffer in between, and copies that the kernel makes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from hra_fx.errors import CheckpointError

#: How much is copied at a time, so that progress can be told.
PIECE = 1 << 26
_SMALL = 1 << 20
#: What tells that the kernel cannot copy between these two files.
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def read_into(source: BinaryIO, buffer: Any, file: Path) -> None:
    """Fill a buffer.

    Raises:
        CheckpointError: the file ends before.
    """
    view = memoryview(buffer).cast("B")
    while view:
        count = source.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{file}: it was cut short while it was read. Fetch it again.")
        view = view[count:]


def write_all(target: BinaryIO, buffer: Any) -> None:
    """Write all of a buffer."""
    view = memoryview(buffer).cast("B")
    while view:
        view = view[target.write(view) :]


def copy(source: BinaryIO, target: BinaryIO, start: int, size: int, file: Path, done: Callable[[int], object]) -> None:
    """Append `size` bytes of a file, from `start` on, to another one, byte for byte.

    Raises:
        CheckpointError: the file ends before.
    """
    while size:
        count = min(size, PIECE)
        copied = _in_kernel(source, target, start, count)
        if not copied:
            copied = min(count, _SMALL)
            buffer = bytearray(copied)
            source.seek(start)
            read_into(source, buffer, file)
            write_all(target, buffer)
        start, size = start + copied, size - copied
        done(copied)


def _in_kernel(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    """How many bytes the kernel copied; none where it cannot."""
    if sys.platform != "linux":
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), count, offset_src=start)
    except OSError as error:
        if error.errno in _CANNOT:
            return 0
        raise
