"""Verify a written file: a rotated weight has the row norms of the base, everything else is identical.

A rotation preserves row norms, so only the two files are needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.edits import Item, Rotation
from hra_fx.checkpoint.disk.header import FLOATS, StoredTensor
from hra_fx.checkpoint.disk.plan import FilePlan
from hra_fx.checkpoint.disk.streams import BLOCK, as_bytes, read_bytes, read_rows
from hra_fx.errors import FoldError


def check_file(plan: FilePlan, file: Path) -> None:
    """Check a written file against the base.

    Raises:
        FoldError: it differs; the message names the tensor.
    """
    start = len(plan.head)
    with open(file, "rb", buffering=0) as written:
        if file.stat().st_size != plan.size or b"".join(read_bytes(written, 0, start, file)) != plan.head:
            raise FoldError(f"{file}: the size or the header differs from what was written. Check the disk.")
        for item in plan.items:
            if isinstance(item.edit, Rotation) and item.source:
                for base, rotation in item.edit.matrices(item.source):
                    place = start + base.start - item.source.start
                    _check_rows(base, rotation, dataclasses.replace(base, name=item.name, file=file, start=place))
            elif not _equal(_expected(item), read_bytes(written, start, item.size, file)):
                raise FoldError(f"{file}: {item.name} differs from what was written. Check the disk.")
            start += item.size


def _expected(item: Item) -> Iterator[bytes | bytearray | memoryview]:
    """The bytes of a tensor that is not rotated."""
    if isinstance(item.edit, Tensor):
        data = as_bytes(item.edit.reshape(-1))
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]
    elif item.source:
        with open(item.source.file, "rb", buffering=0) as stream:
            yield from read_bytes(stream, item.source.start, item.source.size, item.source.file)


def _equal(expected: Iterable[object], found: Iterable[object]) -> bool:
    return all(one == other for one, other in zip(expected, found, strict=True))


def _check_rows(base: StoredTensor, rotation: Rotation, written: StoredTensor) -> None:
    dtype = FLOATS[base.dtype]
    before = _row_norms(base, rotation.columns)
    after = _row_norms(written, rotation.columns)
    info = torch.finfo(dtype)
    width = math.prod(base.shape) / before.numel()
    # Without a wider dtype to compute in, reflections that nearly cancel each other add errors.
    steps = 64 * (1 + rotation.chain.shape[1]) if dtype == torch.float64 else 64
    # Half a unit in the last place of each entry, the smallest number for small ones, and the rounding of float32.
    slack = before * (info.eps / 2 + steps * torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps)
    slack += math.sqrt(width) * info.smallest_normal * info.eps
    off = (after - before).abs() - slack
    if not bool((off <= 0).all()):
        row = int(off.nan_to_num(nan=math.inf).argmax())
        raise FoldError(
            f"{written.file}: row {row} of {written.name} has norm {float(after[row]):.8g}, but "
            f"{float(before[row]):.8g} in the base, and a rotation preserves norms. Check the disk, and whether "
            "another process writes to the file."
        )


def _row_norms(stored: StoredTensor, columns: bool) -> Tensor:
    """Norms of the rows of `W: (out, d)`, in float64."""
    squares = torch.zeros(math.prod(stored.shape[1:]) if columns else stored.shape[0], dtype=torch.float64)
    with open(stored.file, "rb", buffering=0) as stream:
        for first, block in read_rows(stream, stored, FLOATS[stored.dtype]):
            block = block.double().square_()
            if columns:
                squares += block.sum(dim=0)
            else:
                squares[first : first + len(block)] = block.sum(dim=1)
    return squares.sqrt()
