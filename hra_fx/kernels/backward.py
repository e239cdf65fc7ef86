r"""Products for the forward and backward of reflected rows, shared by all kernels.

For `h = x Q^T = x - Z U^T` with `Z = x U T^T`, and for the gradient `G` of `h` with `R = G U T`:

    dL/dx = G - R U^T,        dL/dU = U (S + S^T) - x^T R - G^T Z,        S = M o (R^T Z)

where `M`, with ones above the diagonal and halves on it, gives `T^-1 = M o U^T U`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.kernels.wy_factor import gram_mask


def down_projection(chain: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`F = T U^T: (k, d)`, which maps rows to `Z^T = F x^T`; rounded to `dtype` once.

    Args:
        chain: `U: (d, k)`, at least float32.
        factor: `T: (k, k)`, at least float32.
        dtype: the dtype of the products.
    """
    wide = torch.promote_types(chain.dtype, factor.dtype)
    return torch.mm(factor.to(wide), chain.to(wide).mT).to(dtype)


def project_grad(grad: Tensor, columns: Tensor, factor: Tensor) -> Tensor:
    """`R^T = T^T U^T G^T: (k, n)`, in the wider dtype of `grad` and `factor`.

    Args:
        grad: `G: (n, d)`, in the dtype of the products.
        columns: `U^T: (k, d)`, in the dtype of the products.
        factor: `T: (k, k)`.
    """
    wide = torch.promote_types(grad.dtype, factor.dtype)
    return torch.mm(factor.to(wide).mT, torch.mm(columns, grad.mT).to(wide))


def subtract_low_rank(rows: Tensor, projected: Tensor, columns: Tensor) -> Tensor:
    """`x - Z U^T: (n, d)`, in the dtype of the rows.

    Args:
        rows: `x: (n, d)`.
        projected: `Z^T: (k, n)`, of any dtype.
        columns: `U^T: (k, d)`, in the dtype of the products.
    """
    low = projected.to(columns.dtype)
    if rows.dtype is columns.dtype:
        return torch.addmm(rows, low.mT, columns, alpha=-1)
    return rows - torch.mm(low.mT, columns).to(rows.dtype)


def wy_factor_grad(projected: Tensor, grad: Tensor, chain: Tensor) -> Tensor:
    """The part of `dL/dU^T` through `T`: `(S + S^T) U^T: (k, d)`, from `Z^T: (k, n)`, `R^T: (k, n)` and `U: (d, k)`."""
    inner = torch.mm(grad, projected.mT.to(grad.dtype)).to(chain.dtype)
    inner.mul_(gram_mask(inner))
    return torch.mm(inner + inner.mT, chain.mT)


def subtract_matmul_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total - left right`, in place; the product is rounded once."""
    if total.dtype is left.dtype:
        return total.addmm_(left, right, alpha=-1)
    return total.sub_(torch.mm(left, right))
