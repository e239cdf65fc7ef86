"""Rotate a weight of a file block by block: `W Q = W - (W U) (T U^T)`.

A weight stored as `(out, d)` is read once. For one stored as `(in, out)`, like that of transformers' `Conv1D`, the rows
of the file are the columns of `W`: a first pass computes `W U`, a second one subtracts.

16-bit weights are rotated in float32, wider ones in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.edits import Rotation
from hra_fx.checkpoint.disk.header import FLOATS, StoredTensor
from hra_fx.checkpoint.disk.project import product_dtype, project
from hra_fx.checkpoint.disk.streams import as_bytes, read_rows
from hra_fx.errors import FoldError
from hra_fx.functional import householder

#: The rounding error is measured on this many rows.
_SAMPLE = 16


def rotate_weight(
    source: BinaryIO, stored: StoredTensor, rotation: Rotation, write: Callable[[memoryview], object]
) -> float:
    """Write a rotated weight.

    Args:
        source: the open file, unbuffered.
        stored: the weight, of a floating-point dtype.
        rotation: the rotation, of all experts one after the other.
        write: called with the bytes of each block.

    Returns:
        Relative error `|W'' - W'|_F / |W'|_F` of the cast to the file's dtype, measured on the first rows; of experts,
        the largest.

    Raises:
        FoldError: the rotated weight is not finite.
    """
    return max(_rotate(source, *matrix, write) for matrix in rotation.matrices(stored))


def _rotate(source: BinaryIO, stored: StoredTensor, rotation: Rotation, write: Callable[[memoryview], object]) -> float:
    """Write one rotated matrix."""
    dtype = FLOATS[stored.dtype]
    left, right = _factors(rotation, product_dtype(stored))
    projected = project(source, stored, left, columns=True) if rotation.columns else None
    rounding = 0.0
    for first, block in read_rows(source, stored, dtype):
        wide = block.to(left.dtype, copy=True)
        if projected is None:
            wide.addmm_((left @ wide.mT).mT, right, alpha=-1)
        else:
            wide.addmm_(right[:, first : first + len(wide)].mT, projected, alpha=-1)
        # NaN compares false.
        if not float(torch.linalg.vector_norm(wide, math.inf)) <= torch.finfo(dtype).max:
            raise FoldError(
                f"{stored.file}: the folded {stored.name} is not finite in {stored.dtype}. Check the base weight for "
                "NaN and inf, or store the base model in a wider dtype."
            )
        block.copy_(wide)
        if first == 0:
            rounding = _relative_error(block[:_SAMPLE], wide[:_SAMPLE])
        write(as_bytes(block))
    return rounding


def _factors(rotation: Rotation, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """`U^T` and `T U^T`, both `(k, d)`, computed in float64."""
    # Column-major, since every operation below runs along columns.
    chain = householder.normalize(rotation.chain.double().mT.contiguous().mT)
    left, right = chain.mT, householder.compact_wy(chain) @ chain.mT
    return left.to(wide).contiguous(), right.to(wide).contiguous()


def _relative_error(rounded: Tensor, exact: Tensor) -> float:
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(rounded.to(exact.dtype) - exact)) / size if size else 0.0
