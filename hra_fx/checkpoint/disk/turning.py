"""A weight of a file rotated block by block, `W Q = W - (W U) (T U^T)`, with the same few buffers for all weights.

Stored as `(out, d)`, a block of rows is read, turned and written. Stored as `(in, out)`, as transformers' `Conv1D`, the
rows of the file are the columns of `W`: `W U` is gathered in a first reading, and subtracted in a second one.

Weights of 16 bits are turned in float32, wider ones in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hra_fx import householder
from hra_fx.checkpoint.disk.behind import Behind
from hra_fx.checkpoint.disk.edits import Rotation
from hra_fx.checkpoint.disk.header import FLOATS, Stored
from hra_fx.checkpoint.disk.streams import read_into, write_all
from hra_fx.errors import FoldError

#: Numbers that are turned at a time: what fits into the cache of one core, in float32.
_BLOCK = 1 << 18
#: Bytes that are read and written at a time, so that the threads seldom wait for each other.
_PIECE = 1 << 21
#: Pieces that may wait to be written.
_DEPTH = 4


class Turner:
    """Turns weights from one file into another."""

    def __init__(self) -> None:
        """No buffers yet."""
        self._buffers: dict[str, Tensor] = {}
        self._waiting: dict[str, Future[None]] = {}
        self._turn = 0

    def turn(
        self, stored: Stored, rotation: Rotation, source: BinaryIO, target: Behind, done: Callable[[int], object]
    ) -> float:
        """Write a rotated weight.

        Args:
            stored: the weight, of a floating dtype.
            rotation: what happens to it.
            source: its file, unbuffered.
            target: where to write.
            done: is told how many bytes were written.

        Returns:
            `|W'' - W'|_F / |W'|_F`, what the cast to the dtype of the file costs, of the first block.

        Raises:
            FoldError: the rotated weight is not finite.
        """
        left, right = _factors(rotation, FLOATS[stored.dtype])
        gathered = self._gather(stored, left, source) if rotation.columns else None
        longest = float(torch.linalg.vector_norm(right))
        rounding = 0.0
        for first, piece in self._pieces(stored, source):
            for start, narrow, wide in self._blocks(first, piece, left.dtype):
                if gathered is None:
                    mixed = torch.mm(left, wide.mT, out=self._buffer("mixed", left.dtype, left.shape[0], len(wide)))
                    wide.addmm_(mixed.mT, right, alpha=-1)
                else:
                    mixed = gathered
                    wide.addmm_(right[:, start : start + len(wide)].mT, mixed, alpha=-1)
                if start == 0:
                    rounding = _rounding(wide, narrow.dtype)
                narrow.copy_(wide)
                if not float(torch.linalg.vector_norm(mixed)) * longest < torch.finfo(narrow.dtype).max / 2**13:
                    _check(stored, narrow)
            data = _bytes(piece)
            self._waiting[f"piece {self._turn}"] = target.then(partial(write_all, target.target, data), data.nbytes)
            done(data.nbytes)
        return rounding

    def _gather(self, stored: Stored, left: Tensor, source: BinaryIO) -> Tensor:
        """`(W U)^T: (k, out)` of a weight that is stored as `(in, out)`."""
        total = torch.zeros(left.shape[0], math.prod(stored.shape[1:]), dtype=left.dtype)
        for first, piece in self._pieces(stored, source):
            for start, _, wide in self._blocks(first, piece, left.dtype):
                total.addmm_(left[:, start : start + len(wide)], wide)
        return total

    def _pieces(self, stored: Stored, source: BinaryIO) -> Iterator[tuple[int, Tensor]]:
        """First row, and rows as they are stored; in a buffer that no write needs any more."""
        rows, width = stored.shape[0], math.prod(stored.shape[1:])
        dtype = FLOATS[stored.dtype]
        step = max(1, _PIECE // (width * dtype.itemsize))
        source.seek(stored.start)
        for start in range(0, rows, step):
            self._turn = (self._turn + 1) % _DEPTH
            name = f"piece {self._turn}"
            if name in self._waiting:
                self._waiting.pop(name).result()
            piece = self._buffer(name, dtype, min(step, rows - start), width)
            read_into(source, _bytes(piece), stored.file)
            yield start, piece

    def _blocks(self, first: int, piece: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, rows of a piece, and the same in `dtype`, in a buffer that is used again."""
        step = max(1, _BLOCK // piece.shape[1])
        for start in range(0, len(piece), step):
            narrow = piece[start : start + step]
            yield first + start, narrow, self._buffer("wide", dtype, *narrow.shape).copy_(narrow)

    def _buffer(self, use: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
        size = rows * width * dtype.itemsize
        held = self._buffers.get(use)
        if held is None or held.numel() < size:
            held = self._buffers[use] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype).view(rows, width)


def _bytes(piece: Tensor) -> Any:
    return piece.view(torch.uint8).numpy()


def _factors(rotation: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`U^T` and `T U^T`, both `(k, d)`, made in float64."""
    chain = householder.normalize(rotation.chain)
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    left, right = chain.mT, householder.compact_wy(chain) @ chain.mT
    return left.to(wide).contiguous(), right.to(wide).contiguous()


def _rounding(exact: Tensor, dtype: torch.dtype) -> float:
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(exact.to(dtype).to(exact.dtype) - exact)) / size if size else 0.0


def _check(stored: Stored, narrow: Tensor) -> None:
    """Refuse what is not finite.

    It is called only where `W U`, which any NaN or infinity in a row of `W` reaches, is not finite or so large that
    what is subtracted from `W` might be more than half a step of the dtype's largest number.
    """
    if not bool(torch.isfinite(narrow).all()):
        raise FoldError(
            f"{stored.file}: the folded {stored.name} is not finite in {stored.dtype}. Look for NaN or inf in it, or "
            "store the base model in a wider dtype."
        )
