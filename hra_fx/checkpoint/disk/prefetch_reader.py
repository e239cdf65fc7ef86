"""Weights of files read ahead, piece by piece, by the thread that writes behind.

That thread does one thing after the other. So a buffer can be read into again as soon as the writing of what is in it
has been asked for, and no one waits for anyone but where nothing is left to do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from hra_fx.checkpoint.disk.async_writer import Behind
from hra_fx.checkpoint.disk.buffers import Buffers
from hra_fx.checkpoint.disk.header import FLOATS, Stored
from hra_fx.checkpoint.disk.streams import as_bytes, read_into

#: Bytes of a piece.
_PIECE = 1 << 21
_STEP = 16
#: Pieces that are read ahead; so many that on a busy machine, where a thread is seldom awake, the other has work to do.
_AHEAD = 8


def rows_of_a_piece(stored: Stored) -> int:
    """How many rows of a weight are read at a time."""
    return rows_within(_PIECE, math.prod(stored.shape[1:]) * FLOATS[stored.dtype].itemsize)


def rows_within(size: int, width: int) -> int:
    """How many rows of a width make up about a size: a multiple of 16, with which products are fastest, or fewer.

    >>> rows_within(1000, 10), rows_within(1000, 90), rows_within(1000, 2000)
    (112, 11, 1)
    """
    rows = max(1, size // width)
    return rows if rows < _STEP else -(-rows // _STEP) * _STEP


def pieces(
    weights: Iterable[Stored], opened: Callable[[Path], BinaryIO], behind: Behind, buffers: Buffers
) -> Iterator[Tensor]:
    """The pieces of some weights, one weight after the other.

    Args:
        weights: of floating dtypes; one that is to be read twice is there twice.
        opened: gives a file, unbuffered.
        behind: whose thread reads.
        buffers: where pieces are put.

    Returns:
        Rows as they are stored, `(rows, width)`. A piece is overwritten once the next one has been asked for, but not
        before all that `behind` was told until then is done.
    """
    ahead: deque[tuple[Tensor, Future[None]]] = deque()
    for turn, (stored, first, count) in enumerate(_places(weights)):
        width, dtype = math.prod(stored.shape[1:]), FLOATS[stored.dtype]
        piece = buffers.get(f"piece {turn % (_AHEAD + 1)}", dtype, count, width)
        start = stored.start + first * width * dtype.itemsize
        ahead.append((piece, behind.then(partial(_read, opened(stored.file), start, piece, stored.file), 0)))
        if len(ahead) > _AHEAD:
            yield _taken(ahead)
    while ahead:
        yield _taken(ahead)


def _places(weights: Iterable[Stored]) -> Iterator[tuple[Stored, int, int]]:
    for stored in weights:
        rows, step = stored.shape[0], rows_of_a_piece(stored)
        for first in range(0, rows, step):
            yield stored, first, min(step, rows - first)


def _taken(ahead: deque[tuple[Tensor, Future[None]]]) -> Tensor:
    piece, read = ahead.popleft()
    read.result()
    return piece


def _read(source: BinaryIO, start: int, piece: Tensor, file: Path) -> None:
    source.seek(start)
    read_into(source, as_bytes(piece), file)
