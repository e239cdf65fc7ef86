r"""The gradient of a chain of vectors, whichever way its reflections were applied.

Of `h = x Q^T = x - Z U^T` with `Z = x U T^T`, and for the gradient `G` of `h` with `R = G U T`:

    dL/dx = G - R U^T,        dL/dU = U (S + S^T) - x^T R - G^T Z,        S = M o (R^T Z)

where `M`, ones above the diagonal and halves on it, takes `U^T U` to `T^-1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.kernels.wy_factor import mask_like


def filters_of(chain: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`F = T U^T: (k, d)`, with which rows are read, `Z^T = F x^T`; rounded once.

    Args:
        chain: `U: (d, k)`, float32 or wider.
        factor: `T: (k, k)`, likewise.
        dtype: that of the products.
    """
    wide = torch.promote_types(chain.dtype, factor.dtype)
    return torch.mm(factor.to(wide), chain.to(wide).mT).to(dtype)


def back_of(given: Tensor, columns: Tensor, factor: Tensor) -> Tensor:
    """`R^T = T^T U^T G^T: (k, n)`, as wide as `T` is at least.

    Args:
        given: `G: (n, d)`, in the dtype of the products.
        columns: `U^T: (k, d)`, likewise.
        factor: `T: (k, k)`.
    """
    wide = torch.promote_types(given.dtype, factor.dtype)
    return torch.mm(factor.to(wide).mT, torch.mm(columns, given.mT).to(wide))


def minus(rows: Tensor, read: Tensor, columns: Tensor) -> Tensor:
    """`x - Z U^T: (n, d)`, in the dtype of the rows.

    Args:
        rows: `x: (n, d)`.
        read: `Z^T: (k, n)`, of any dtype.
        columns: `U^T: (k, d)`, in the dtype of the products.
    """
    low = read.to(columns.dtype)
    if rows.dtype is columns.dtype:
        return torch.addmm(rows, low.mT, columns, alpha=-1)
    return rows - torch.mm(low.mT, columns).to(rows.dtype)


def apart(read: Tensor, back: Tensor, chain: Tensor) -> Tensor:
    """The part of `dL/dU` that comes by way of `T`: `(S + S^T) U^T: (k, d)`, for `Z^T`, `R^T: (k, n)` and `U`."""
    inner = torch.mm(back, read.mT.to(back.dtype)).to(chain.dtype)
    inner.mul_(mask_like(inner))
    return torch.mm(inner + inner.mT, chain.mT)


def take(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total - left right`, in place, each product rounded once."""
    if total.dtype is left.dtype:
        return total.addmm_(left, right, alpha=-1)
    return total.sub_(torch.mm(left, right))
