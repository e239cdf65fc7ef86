r"""The two factors of a chain of reflections, `R` and `F`, for any number of layers in one autograd node.

A chain `U: (d, k)` acts on rows as `x Q^T = x + (x F^T) R`, with the unit vectors `R = (U / |u|)^T: (k, d)` and
`F = -T R: (k, d)`, for `T` of `hra_fx.functional.householder.compact_wy`. From gradients `dR` and `dF`:

    S = T^T dF,    G = triu(S R^T T^T, 1),    dR' = dR - S + (G + G^T) R,    dU^T = (dR' - R (R . dR')) / |u|
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.dispatch import is_plain_eager


class Factors(NamedTuple):
    """`R` and `F`, each `(..., k, d)`."""

    rows: Tensor
    down: Tensor


def wy_factors(vectors: Tensor) -> Factors:
    """The factors of chains of one shape.

    Args:
        vectors: `U: (..., d, k)`, of any lengths, at least float32; a zero column is the identity.

    Returns:
        `R` and `F`, `(..., k, d)` in the dtype of `vectors`.

    Example:
        >>> rows, down = wy_factors(torch.tensor([[3.0], [0.0]]))
        >>> torch.eye(2) + down.T @ rows
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """
    with householder.without_autocast(vectors):
        if is_plain_eager():
            return Factors(*_WYFactors.apply(vectors))  # type: ignore[no-untyped-call]
        return _plain_factors(vectors)


def _plain_factors(vectors: Tensor) -> Factors:
    """The same in differentiable operators, for compilers, forward-mode derivatives and second derivatives."""
    # The lengths are not constants here, as they are in `householder.normalize`: second derivatives depend on them.
    scaled = householder.normalize(vectors)
    lengths = torch.linalg.vector_norm(scaled, dim=-2, keepdim=True)
    chain = scaled / torch.where(lengths > 0, lengths, 1.0)
    return Factors(chain.mT, -(householder.compact_wy(chain) @ chain.mT))


class _WYFactors(torch.autograd.Function):
    """`U -> (R, F)`."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
        rows, lengths = _unit_rows(vectors)
        inverse = (rows @ rows.mT).triu_(1)
        inverse.diagonal(dim1=-2, dim2=-1).fill_(0.5)
        identity = torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device).expand_as(inverse)
        factor = torch.linalg.solve_triangular(inverse, identity, upper=True)
        ctx.save_for_backward(vectors, rows, lengths, factor)
        return rows, (factor @ rows).neg_()

    @staticmethod
    def backward(ctx: Any, rows_grad: Tensor, down_grad: Tensor) -> Tensor:
        gradient: Tensor
        vectors, rows, lengths, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            own = vectors.view_as(vectors)
            (gradient,) = torch.autograd.grad(_plain_factors(own), own, (rows_grad, down_grad), create_graph=True)
            return gradient
        with householder.without_autocast(vectors):
            through = factor.mT @ down_grad
            gram_grad = ((through @ rows.mT) @ factor.mT).triu_(1)
            total = rows_grad - through + (gram_grad + gram_grad.mT) @ rows
            # The length of a vector has no effect.
            total -= rows * (rows * total).sum(-1, keepdim=True)
            gradient = (total / lengths).mT.contiguous()
            return gradient


def _unit_rows(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`R: (..., k, d)`, contiguous, and the lengths `(..., k, 1)` of `U`; 1 for a zero column."""
    rows = vectors.mT.contiguous()
    # In float64, because the squares of a column can overflow in float32 where its entries do not.
    wide = rows.dtype if rows.device.type == "mps" else torch.float64
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide).to(rows.dtype)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return rows / lengths, lengths
