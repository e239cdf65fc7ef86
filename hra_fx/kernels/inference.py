"""Rows turned by constant factors: where no gradient is asked for, and the factors are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.backward import filters_of, minus
from hra_fx.kernels.wy_factor import bearable


def factors(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What rows have to be multiplied with, for `turned`: `U: (d, k)` and `F = T U^T: (k, d)`, in the given dtype.

    Args:
        vectors: `U: (d, k)`, of any length each.
        dtype: that of the products.
    """
    with householder.without_autocast(vectors):
        chain, factor = bearable(vectors, dtype)
        # Laid out as vectors are in training, so that it gives the same numbers to the last bit.
        return chain.to(dtype), filters_of(chain, factor, dtype)


def turned(x: Tensor, chain: Tensor, filters: Tensor) -> Tensor:
    """`x Q^T: (..., d)` by what `factors` gave; without gradients.

    Example:
        >>> turned(torch.tensor([[2.0, 5.0]]), *factors(torch.tensor([[3.0], [0.0]]), torch.float32))
        tensor([[-2.,  5.]])
    """
    with householder.without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        return minus(rows, torch.mm(filters, rows.to(chain.dtype).mT), chain.mT).view(x.shape)
