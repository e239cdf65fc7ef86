r"""The gradient of a chain of vectors, whichever way its reflections were applied.

Of `h = x Q^T = x - Z U^T` with `Z = x U T^T`, and for the gradient `G` of `h` with `R = G U T`:

    dL/dx = G - R U^T,        dL/dU = U (S + S^T) - x^T R - G^T Z,        S = M o (R^T Z)

where `M`, ones above the diagonal and halves on it, takes `U^T U` to `T^-1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.fused.factors import mask_like


def less(x: Tensor, read: Tensor, columns: Tensor) -> Tensor:
    """`x - Z U^T`, in the shape and dtype of `x`, and no view: what a node gives, others may write into.

    Args:
        x: `(..., d)`, of `n` rows.
        read: `Z^T: (k, n)`.
        columns: `U^T: (k, d)`, in the dtype of the products, as `read` is.
    """
    if x.dtype is not columns.dtype:
        return x - torch.mm(read.mT, columns).to(x.dtype).view(x.shape)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.addmm(x.reshape(-1, x.shape[-1]), read.mT, columns, alpha=-1, out=total.view(-1, x.shape[-1]))
    return total


def apart(read: Tensor, back: Tensor, chain: Tensor) -> Tensor:
    """The part of `dL/dU` that comes by way of `T`: `(S + S^T) U^T: (k, d)`, for `Z^T`, `R^T: (k, n)` and `U`."""
    inner = torch.mm(back, read.mT).to(chain.dtype)
    inner.mul_(mask_like(inner))
    return torch.mm(inner + inner.mT, chain.mT)


def take(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total - left right`, in place, each product rounded once."""
    if total.dtype is left.dtype:
        return total.addmm_(left, right, alpha=-1)
    return total.sub_(torch.mm(left, right))
