"""Reading and writing of files without a buffer in between, and copies that the kernel makes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hra_fx.errors import CheckpointError

#: How much is copied at a time, so that progress can be told.
_PIECE = 1 << 26
_SMALL = 1 << 20
#: What tells that the kernel cannot copy between these two files.
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Part:
    """A part of a file that is copied.

    Attributes:
        file: the file.
        start: its first byte.
        at: the byte of the new file where that goes.
        size: how many there are.
    """

    file: Path
    start: int
    at: int
    size: int

    def cut(self, size: int) -> Iterator[Part]:
        """Parts of at most `size` bytes."""
        for offset in range(0, self.size, size):
            yield Part(self.file, self.start + offset, self.at + offset, min(size, self.size - offset))


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: Any = tensor.view(torch.uint8).numpy()
    return memoryview(data).cast("B")


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


def write_all(target: BinaryIO, buffer: Any, at: int = 0) -> None:
    """Write all of a buffer, from byte `at` of the file on."""
    target.seek(at)
    view = memoryview(buffer).cast("B")
    while view:
        view = view[target.write(view) :]


def copy(part: Part, source: BinaryIO, target: BinaryIO, done: Callable[[int], object]) -> None:
    """Copy a part of a file into another one, byte for byte.

    Args:
        part: what, and to where.
        source: the file that it is of, unbuffered.
        target: the other one, unbuffered.
        done: is told of bytes as they are copied.

    Raises:
        CheckpointError: the file ends before.
    """
    start, at, size = part.start, part.at, part.size
    while size:
        count = min(size, _PIECE)
        copied = _in_kernel(source, target, start, at, count)
        if not copied:
            copied = min(count, _SMALL)
            buffer = bytearray(copied)
            source.seek(start)
            read_into(source, buffer, part.file)
            write_all(target, buffer, at)
        start, at, size = start + copied, at + copied, size - copied
        done(copied)


def _in_kernel(source: BinaryIO, target: BinaryIO, start: int, at: int, count: int) -> int:
    """How many bytes the kernel copied; none where it cannot."""
    if sys.platform != "linux":
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), count, offset_src=start, offset_dst=at)
    except OSError as error:
        if error.errno in _CANNOT:
            return 0
        raise
