"""Whether a written file is what it has to be: `|W'| = |W|` for every row of a rotated weight, equal bytes elsewhere.

A rotation keeps the length of every row, so that nothing but the two files has to be known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.edit_types import FilePlan, Given, Item, Rotation
from hra_fx.checkpoint.disk.header import FLOATS, Stored
from hra_fx.checkpoint.disk.streams import as_bytes, read_into
from hra_fx.errors import FoldError

_BLOCK = 1 << 20


def check_file(plan: FilePlan, file: Path) -> None:
    """Check a written file against the base.

    Raises:
        FoldError: it differs; the tensor is named.
    """
    start = len(plan.head)
    with open(file, "rb", buffering=0) as written:
        head = bytearray(start)
        read_into(written, head, file)
        if head != plan.head:
            raise FoldError(f"{file}: its header is not what was written. Is the disk failing?")
        for item in plan.items:
            if isinstance(item.edit, Rotation) and item.source:
                _check_rows(item, item.source, item.edit, file, start)
            elif isinstance(item.edit, Given):
                given = as_bytes(item.edit.tensor.reshape(-1)).tobytes()
                _compare(item, given, b"".join(_pieces(written, start, item.size, file)), file)
            elif item.source:
                with open(item.source.file, "rb", buffering=0) as base:
                    both = zip(
                        _pieces(base, item.source.start, item.size, item.source.file),
                        _pieces(written, start, item.size, file),
                        strict=True,
                    )
                    for own, copied in both:
                        _compare(item, own, copied, file)
            start += item.size


def check_copy(base: Path, file: Path) -> None:
    """Check a file that was copied whole.

    Raises:
        FoldError: it differs.
    """
    size = base.stat().st_size
    with open(base, "rb", buffering=0) as own, open(file, "rb", buffering=0) as copied:
        same = file.stat().st_size == size and all(
            one == other for one, other in zip(_pieces(own, 0, size, base), _pieces(copied, 0, size, file), strict=True)
        )
    if not same:
        raise FoldError(f"{file}: was to be a copy of {base}, and its bytes differ. Is the disk failing?")


def _pieces(stream: BinaryIO, start: int, size: int, file: Path) -> Iterator[bytes]:
    stream.seek(start)
    for left in range(size, 0, -_BLOCK):
        buffer = bytearray(min(_BLOCK, left))
        read_into(stream, buffer, file)
        yield bytes(buffer)


def _compare(item: Item, due: bytes, found: bytes, file: Path) -> None:
    if due != found:
        raise FoldError(f"{file}: {item.name} was to be copied, and its bytes differ. Is the disk failing?")


def _check_rows(item: Item, base: Stored, rotation: Rotation, file: Path, start: int) -> None:
    dtype = FLOATS[base.dtype]
    before = _lengths(base.file, base.start, base, dtype, rotation.columns)
    after = _lengths(file, start, base, dtype, rotation.columns)
    info = torch.finfo(dtype)
    width = math.prod(item.shape) / before.numel()
    # What is turned in the dtype itself shows what vectors that nearly cancel each other lose: more, the more they are.
    steps = 64 * (1 + rotation.chain.shape[1]) if dtype == torch.float64 else 64
    # Half a unit in the last place of each entry, the least number's for small ones, and what float32 rounds besides.
    slack = before * (info.eps / 2 + steps * torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps)
    slack += math.sqrt(width) * info.smallest_normal * info.eps
    off = (after - before).abs() - slack
    if not bool((off <= 0).all()):
        row = int(off.nan_to_num(nan=math.inf).argmax())
        raise FoldError(
            f"{file}: row {row} of {item.name} has length {float(after[row]):.8g}, and had {float(before[row]):.8g}, "
            "which no rotation does. Is the disk failing, or another process writing?"
        )


def _lengths(file: Path, start: int, like: Stored, dtype: torch.dtype, columns: bool) -> Tensor:
    """The lengths of the rows of `W: (out, d)`, in float64."""
    rows, width = like.shape[0], math.prod(like.shape[1:])
    step = max(1, _BLOCK // (width * dtype.itemsize))
    squares = torch.zeros(width if columns else rows, dtype=torch.float64)
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        for first in range(0, rows, step):
            block = torch.empty(min(step, rows - first), width, dtype=dtype)
            read_into(stream, as_bytes(block), file)
            block = block.double().square_()
            if columns:
                squares += block.sum(dim=0)
            else:
                squares[first : first + step] = block.sum(dim=1)
    return squares.sqrt()
