"""Rotate the weights of files: `W Q = W - (W U) (T U^T)`.

16-bit weights are multiplied in float32, wider weights in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.stored import StoredTensor
from hra_fx.errors import FoldError
from hra_fx.functional import householder

#: The number of values in a block.
_BLOCK = 1 << 19


@dataclass(frozen=True)
class Rotation:
    """The rotation `W -> W Q` of a stored weight.

    Attributes:
        chain: `U: (d, k)` of `Q`; for a tensor with all experts, `(experts, d, k)`.
        columns: whether the weight is `(in, out)`.
    """

    chain: Tensor
    columns: bool

    def matrices(self, stored: StoredTensor) -> Iterator[tuple[StoredTensor, Rotation]]:
        """The weight itself, or the weight of each expert, with its rotation."""
        if self.chain.dim() == 2:
            yield stored, self
            return
        for i, chain in enumerate(self.chain):
            one = dataclasses.replace(stored, shape=stored.shape[1:], index=i)
            yield one, dataclasses.replace(self, chain=chain)

    def split(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight itself, or the weight of each expert, as a matrix, with its chain."""
        if self.chain.dim() == 2:
            yield weight.flatten(1), self.chain
        else:
            yield from zip(weight, self.chain, strict=True)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products with a weight: float32 for 16-bit weights, otherwise float64."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def project(left: Tensor, weight: Tensor, *, columns: bool) -> Tensor:
    """Compute `V^T W^T: (k, out)` for a weight `W: (out, d)`.

    Args:
        left: `V^T: (k, d)`, in `product_dtype(weight.dtype)`.
        weight: `(out, d)`, or `(d, out)` if `columns`.
        columns: whether the weight is `(d, out)`.
    """
    if not columns:
        return torch.cat([left @ weight[rows].to(left.dtype).mT for rows in _blocks(weight)], dim=1)
    result = left.new_zeros(left.shape[0], weight.shape[1])
    for rows in _blocks(weight):
        result.addmm_(left[:, rows], weight[rows].to(left.dtype))
    return result


def rotated(stored: StoredTensor, weight: Tensor, rotation: Rotation) -> tuple[Tensor, float]:
    """Rotate a weight. Returns it in its dtype, and the relative error `|W'' - W'|_F / |W'|_F` of the cast.

    Args:
        stored: the origin of the weight, for messages.
        weight: the weight, with a floating-point dtype.
        rotation: its rotation.

    Raises:
        FoldError: the rotated weight is not finite.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    targets = [matrix for matrix, _ in rotation.split(result)]
    errors = []
    for (matrix, chain), target in zip(rotation.split(weight), targets, strict=True):
        left, right = _factors(chain, product_dtype(weight.dtype))
        errors.append(_rotate(matrix, left, right, target, columns=rotation.columns))
    if not math.isfinite(rounding := max(errors)):
        raise FoldError(
            f"{stored.file}: the folded {stored.name} is not finite in {stored.dtype}. Check the base weight for NaN "
            "and inf, or store the base model in a wider dtype."
        )
    return result, rounding


def _rotate(matrix: Tensor, left: Tensor, right: Tensor, target: Tensor, *, columns: bool) -> float:
    """Write a rotated matrix. Returns the error of the cast in its first rows; infinite if the result is not finite."""
    projected = project(left, matrix, columns=True) if columns else None
    rounding, largest = 0.0, torch.finfo(matrix.dtype).max
    for rows in _blocks(matrix):
        wide = matrix[rows].to(left.dtype, copy=True)
        if projected is None:
            wide.addmm_((left @ wide.mT).mT, right, alpha=-1)
        else:
            wide.addmm_(right[:, rows].mT, projected, alpha=-1)
        target[rows] = wide
        if not float(torch.linalg.vector_norm(wide, math.inf)) <= largest:  # NaN compares false
            return math.inf
        if rows.start == 0 and (size := float(torch.linalg.vector_norm(wide))):
            rounding = float(torch.dist(target[rows].to(wide.dtype), wide)) / size
    return rounding


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit into the cache of a CPU."""
    step = max(1, _BLOCK // matrix.shape[1])
    yield from (slice(first, first + step) for first in range(0, len(matrix), step))


def _factors(chain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`U^T` and `T U^T`, both `(k, d)`, computed in float64."""
    # Column-major, because every operation below runs along columns.
    chain = householder.normalize(chain.double().mT.contiguous().mT)
    left, right = chain.mT, householder.compact_wy(chain) @ chain.mT
    return left.to(dtype).contiguous(), right.to(dtype).contiguous()
