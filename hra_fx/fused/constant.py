"""Rows turned by constant factors, in two products: where no gradient is asked for, and the factors are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx import householder
from hra_fx.fused.gradients import less


def factors(chain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What rows have to be multiplied with, for `turned`.

    Args:
        chain: `U: (d, k)` of length one each.
        dtype: that of the products.

    Returns:
        `U^T` and `(U T)^T`, `(k, d)` both.
    """
    with householder.without_autocast(chain):
        factor = householder.compact_wy(chain)
        # U T is made before the cast, so that a narrow dtype rounds the small factor once and not T and U apart.
        both = (chain, chain.to(factor.dtype) @ factor)
        first, second = (matrix.to(dtype).mT.contiguous() for matrix in both)
    return first, second


def turned(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`x Q^T: (..., d)` by what `factors` gave; without gradients.

    Example:
        >>> turned(torch.tensor([[2.0, 5.0]]), *factors(torch.tensor([[1.0], [0.0]]), torch.float32))
        tensor([[-2.,  5.]])
    """
    with householder.without_autocast(x):
        rows = x.reshape(-1, x.shape[-1]).to(first.dtype)
        return less(x, torch.mm(first, rows.mT), second)
