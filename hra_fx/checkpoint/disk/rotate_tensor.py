"""A weight of a file rotated block by block, `W Q = W - (W U) (T U^T)`, with the same few buffers for all weights.

Stored as `(out, d)`, a block of rows is read, turned and written. Stored as `(in, out)`, as transformers' `Conv1D`, the
rows of the file are the columns of `W`: `W U` is gathered in a first reading, and subtracted in a second one.

Weights of 16 bits are turned in float32, wider ones in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.async_writer import Behind
from hra_fx.checkpoint.disk.buffers import Buffers
from hra_fx.checkpoint.disk.edit_types import Rotation
from hra_fx.checkpoint.disk.header import FLOATS, Stored
from hra_fx.checkpoint.disk.prefetch_reader import rows_of_a_piece, rows_within
from hra_fx.checkpoint.disk.streams import as_bytes
from hra_fx.errors import FoldError
from hra_fx.functional import householder

#: Numbers that are turned at a time; fewer are slower, for each product has its costs, and more leave the cache.
_BLOCK = 1 << 19
#: Numbers between rows: where rows are a power of two apart they fall into the same few places of the cache, and
#: products take a third longer.
_SPARE = 16
#: Rows by which the cost of rounding is told.
_SAMPLE = 16


def readings(stored: Stored, rotation: Rotation) -> list[Stored]:
    """The weight as often as `turn` reads it."""
    return [stored] * (2 if rotation.columns else 1)


def turn(
    stored: Stored,
    rotation: Rotation,
    pieces: Iterator[Tensor],
    target: Behind,
    at: int,
    buffers: Buffers,
    done: Callable[[int], object],
) -> float:
    """Write a rotated weight.

    Args:
        stored: the weight, of a floating dtype.
        rotation: what happens to it.
        pieces: its rows, see `reading_ahead.pieces` and `readings`; what belongs to other weights is left.
        target: where to write.
        at: the byte of that file where the weight begins.
        buffers: memory to work in.
        done: is told how many bytes were written.

    Returns:
        `|W'' - W'|_F / |W'|_F`, what the cast to the dtype of the file costs, of the first few rows.

    Raises:
        FoldError: the rotated weight is not finite.
    """
    left, right = _factors(rotation, FLOATS[stored.dtype])
    gathered = _gather(stored, left, pieces, buffers) if rotation.columns else None
    longest = float(torch.linalg.vector_norm(right))
    rounding = 0.0
    for first in range(0, stored.shape[0], rows_of_a_piece(stored)):
        piece = next(pieces)
        for start, narrow, wide in _blocks(first, piece, left.dtype, buffers):
            count = wide.shape[0]
            if gathered is None:
                mixed = torch.mm(left, wide.mT, out=buffers.get("mixed", left.dtype, left.shape[0], count))
                wide.addmm_(mixed.mT, right, alpha=-1)
            else:
                mixed = gathered
                wide.addmm_(right[:, start : start + count].mT, mixed, alpha=-1)
            narrow.copy_(wide)
            if start == 0:
                rounding = _rounding(wide[:_SAMPLE], narrow[:_SAMPLE])
            if not float(torch.linalg.vector_norm(mixed)) * longest < torch.finfo(narrow.dtype).max / 2**13:
                _check(stored, narrow)
        data = as_bytes(piece)
        target.write(at, data)
        at += len(data)
        done(len(data))
    return rounding


def _gather(stored: Stored, left: Tensor, pieces: Iterator[Tensor], buffers: Buffers) -> Tensor:
    """`(W U)^T: (k, out)` of a weight that is stored as `(in, out)`."""
    total = torch.zeros(left.shape[0], math.prod(stored.shape[1:]), dtype=left.dtype)
    for first in range(0, stored.shape[0], rows_of_a_piece(stored)):
        for start, _, wide in _blocks(first, next(pieces), left.dtype, buffers):
            total.addmm_(left[:, start : start + wide.shape[0]], wide)
    return total


def _blocks(first: int, piece: Tensor, dtype: torch.dtype, buffers: Buffers) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, rows of a piece, and the same in `dtype`, in a buffer that is used again."""
    rows, width = piece.shape
    step = rows_within(_BLOCK, width)
    for start in range(0, rows, step):
        narrow = piece[start : start + step]
        wide = buffers.get("wide", dtype, min(step, rows - start), width, _SPARE)
        yield first + start, narrow, wide.copy_(narrow)


def _factors(rotation: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`U^T` and `T U^T`, both `(k, d)`, made in float64."""
    # Laid out column by column, which are what all of this goes along.
    chain = householder.normalize(rotation.chain.mT.contiguous().mT)
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    left, right = chain.mT, householder.compact_wy(chain) @ chain.mT
    return left.to(wide).contiguous(), right.to(wide).contiguous()


def _rounding(exact: Tensor, narrow: Tensor) -> float:
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(narrow.to(exact.dtype) - exact)) / size if size else 0.0


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
