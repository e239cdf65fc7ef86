"""Read and write tensors of safetensors files without intermediate copies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.header import StoredTensor
from hra_fx.errors import CheckpointError

#: Size of a block in bytes: large enough for fast matrix products, small enough for the processor's cache.
BLOCK = 1 << 21
_ROW_MULTIPLE = 16


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: Any = tensor.view(torch.uint8).numpy()
    return memoryview(data).cast("B")


def read_into(source: BinaryIO, buffer: Any, file: Path) -> None:
    """Fill a buffer from the current position.

    Raises:
        CheckpointError: the file is too short.
    """
    view = memoryview(buffer).cast("B")
    while view:
        count = source.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{file}: the file became shorter while it was read. Download it again.")
        view = view[count:]


def read_first(stored: StoredTensor, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` values of a tensor, `(count,)`.

    Raises:
        CheckpointError: the file is too short.
    """
    values = torch.empty(count, dtype=dtype)
    with open(stored.file, "rb", buffering=0) as stream:
        stream.seek(stored.start)
        read_into(stream, as_bytes(values), stored.file)
    return values


def read_bytes(source: BinaryIO, start: int, size: int, file: Path) -> Iterator[bytearray]:
    """Read `size` bytes from `start` on, block by block."""
    source.seek(start)
    for left in range(size, 0, -BLOCK):
        block = bytearray(min(BLOCK, left))
        read_into(source, block, file)
        yield block


def read_rows(source: BinaryIO, stored: StoredTensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Read a tensor as rows `(rows, width)`, block by block: index of the first row, rows."""
    rows, width = stored.shape[0], math.prod(stored.shape[1:])
    step = max(1, BLOCK // (width * dtype.itemsize))
    if step > _ROW_MULTIPLE:  # matrix products are fastest
        step -= step % _ROW_MULTIPLE
    source.seek(stored.start)
    for first in range(0, rows, step):
        block = torch.empty(min(step, rows - first), width, dtype=dtype)
        read_into(source, as_bytes(block), stored.file)
        yield first, block
