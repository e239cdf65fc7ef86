"""A weight of a file rotated block by block, `W Q = W - (W U) (T U^T)`, with the same few buffers for all weights.

Stored as `(out, d)`, a block of rows is read, turned and written. Stored as `(in, out)`, as transformers' `Conv1D`, the
rows of the file are the columns of `W`: `W U` is gathered in a first reading, and subtracted in a second one.

Weights of 16 bits are turned in float32, wider ones in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

from hra_fx import householder
from hra_fx.checkpoint.disk.edits import Rotation
from hra_fx.checkpoint.disk.header import FLOATS, Stored
from hra_fx.checkpoint.disk.streams import read_into, write_all
from hra_fx.errors import FoldError

#: Numbers to a block: what fits into the cache of one core along with its float32 form.
BLOCK = 1 << 19


class Turner:
    """Turns weights from one file into another."""

    def __init__(self) -> None:
        """No buffers yet."""
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def turn(
        self, stored: Stored, rotation: Rotation, source: BinaryIO, target: BinaryIO, done: Callable[[int], object]
    ) -> float:
        """Write a rotated weight.

        Args:
            stored: the weight, of a floating dtype.
            rotation: what happens to it.
            source: its file, unbuffered.
            target: where to write, unbuffered.
            done: is told how many bytes were written.

        Returns:
            `|W'' - W'|_F / |W'|_F`, what the cast to the dtype of the file costs, of the first block.

        Raises:
            FoldError: the rotated weight is not finite.
        """
        left, right = self._factors(rotation, FLOATS[stored.dtype])
        rows, width = stored.shape[0], math.prod(stored.shape[1:])
        step = max(1, BLOCK // max(1, width))
        blocks = [(start, min(step, rows - start)) for start in range(0, rows, step)]
        gathered = self._gather(stored, left, source, blocks, width) if rotation.columns else None
        source.seek(stored.start)
        rounding = 0.0
        for start, count in blocks:
            narrow, wide = self._read(stored, source, count, width, left.dtype)
            if gathered is None:
                mixed = torch.mm(left, wide.mT, out=self._buffer("mixed", left.dtype, left.shape[0], count))
                wide.addmm_(mixed.mT, right, alpha=-1)
            else:
                wide.addmm_(right[:, start : start + count].mT, gathered, alpha=-1)
            if start == 0:
                rounding = _rounding(wide, narrow.dtype)
            _check(stored, wide, narrow.copy_(wide))
            write_all(target, narrow.view(torch.uint8).numpy())
            done(narrow.numel() * narrow.itemsize)
        return rounding

    def _gather(
        self, stored: Stored, left: Tensor, source: BinaryIO, blocks: list[tuple[int, int]], width: int
    ) -> Tensor:
        """`(W U)^T: (k, out)` of a weight that is stored as `(in, out)`."""
        source.seek(stored.start)
        total = torch.zeros(left.shape[0], width, dtype=left.dtype)
        for start, count in blocks:
            _, wide = self._read(stored, source, count, width, left.dtype)
            total.addmm_(left[:, start : start + count], wide)
        return total

    def _read(
        self, stored: Stored, source: BinaryIO, rows: int, width: int, wide: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        narrow = self._buffer("narrow", FLOATS[stored.dtype], rows, width)
        read_into(source, narrow.view(torch.uint8).numpy(), stored.file)
        return narrow, self._buffer("wide", wide, rows, width).copy_(narrow)

    def _buffer(self, use: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
        held = self._buffers.get((use, dtype))
        if held is None or held.numel() < rows * width:
            held = self._buffers[use, dtype] = torch.empty(rows * width, dtype=dtype)
        return held[: rows * width].view(rows, width)

    def _factors(self, rotation: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`U^T` and `T U^T`, both `(k, d)`, made in float64."""
        chain = householder.normalize(rotation.chain)
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        left, right = chain.mT, householder.compact_wy(chain) @ chain.mT
        return left.to(wide).contiguous(), right.to(wide).contiguous()


def _rounding(exact: Tensor, dtype: torch.dtype) -> float:
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(exact.to(dtype).to(exact.dtype) - exact)) / size if size else 0.0


def _check(stored: Stored, wide: Tensor, narrow: Tensor) -> None:
    # The norm is finite and small for nearly all weights, and costs a fraction of a look at every number.
    if float(torch.linalg.vector_norm(wide)) < torch.finfo(narrow.dtype).max / 2:
        return
    if not bool(torch.isfinite(narrow).all()):
        raise FoldError(
            f"{stored.file}: the folded {stored.name} is not finite in {stored.dtype}. Look for NaN or inf in it, or "
            "store the base model in a wider dtype."
        )
