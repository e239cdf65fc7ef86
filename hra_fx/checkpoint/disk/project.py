"""Multiply a weight of a file by a thin matrix, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.header import FLOATS, StoredTensor
from hra_fx.checkpoint.disk.streams import read_rows


def product_dtype(stored: StoredTensor) -> torch.dtype:
    """The dtype of products with a weight: float32 if it has 16 bits, else float64."""
    return torch.float32 if FLOATS[stored.dtype].itemsize == 2 else torch.float64


def project(
    source: BinaryIO,
    stored: StoredTensor,
    left: Tensor,
    *,
    columns: bool,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """`V^T W^T: (k, out)` of a weight `W: (out, d)`.

    Args:
        source: the open file, unbuffered.
        stored: the weight, of a floating-point dtype; trailing dimensions are flattened.
        left: `V^T: (k, d)`, in `product_dtype(stored)`.
        columns: whether the weight is stored as `(d, out)`.
        advance: called with numbers of bytes, for a progress bar.
    """
    dtype = FLOATS[stored.dtype]
    out = math.prod(stored.shape[1:]) if columns else stored.shape[0]
    total = torch.zeros(left.shape[0], out, dtype=left.dtype)
    for first, block in read_rows(source, stored, dtype):
        rows = slice(first, first + len(block))
        if columns:
            total.addmm_(left[:, rows], block.to(left.dtype))
        else:
            total[:, rows] = left @ block.to(left.dtype).mT
        advance(block.numel() * dtype.itemsize)
    return total
