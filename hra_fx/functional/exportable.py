r"""The factor `T` and Gram-Schmidt with matrix products only, because other runtimes lack triangular solve and QR.

Both use products, sums and comparisons of core ATen, and are differentiable. The number of steps depends only on the
shape, so the exported graph does not have loops.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compact_wy(chain: Tensor) -> Tensor:
    r"""Compute the factor `T` of a chain by doubling: inverses of diagonal blocks give inverses of larger blocks.

        T^-1 = D + N,    X_0 = D^-1,    X <- X - X (N o M_s) X    for s = 1, 2, 4, ... < k

    where `M_s` selects the upper right `s x s` part of each `2s x 2s` diagonal block: for `X = diag(A^-1, C^-1)` one
    step gives the inverse of `[A B; 0 C]`, whose corner is `-A^-1 B C^-1`. It is as accurate as a triangular solve; the
    shorter `(I - N)(I + N^2)(I + N^4) ...` loses all digits for nearly parallel columns.

    Args:
        chain: `U: (..., d, k)`, in the dtype to compute in.

    Returns:
        `T: (..., k, k)`, as `hra_fx.functional.householder.compact_wy` returns it.

    Example:
        >>> U = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        >>> compact_wy(U)
        tensor([[ 2., -2.],
                [ 0.,  1.]])
    """
    squares = (chain * chain).sum(dim=-2, keepdim=True)
    halves = torch.where(squares > torch.finfo(chain.dtype).tiny, squares / 2, 1.0)
    index = torch.arange(chain.shape[-1], device=chain.device)
    row, column = index.unsqueeze(1), index.unsqueeze(0)
    upper = torch.where(row < column, chain.mT @ chain, 0.0)
    inverse = torch.where(row == column, halves.reciprocal(), 0.0)
    # In each step, an entry belongs to the corner of a block if this is the highest bit in which row and column differ.
    difference = row ^ column
    size = 1
    while size < chain.shape[-1]:
        corner = (difference >= size) & (difference < 2 * size)
        inverse = inverse - inverse @ torch.where(corner, upper, 0.0) @ inverse
        size *= 2
    return inverse


def gram_schmidt(vectors: Tensor) -> Tensor:
    """Compute Gram-Schmidt by the recurrence, with each projection applied twice.

    A single projection loses orthogonality with the square of the condition number; the second one removes the rounding
    error of the first ("twice is enough", Giraud et al. 2005, https://doi.org/10.1007/s00211-005-0615-4).

    Args:
        vectors: `U: (..., d, r)` of full column rank, in the dtype to compute in; squared lengths must be in range.

    Returns:
        `V: (..., d, r)`, as `hra_fx.functional.householder.orthonormalize` returns it.

    Example:
        >>> gram_schmidt(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    basis: Tensor | None = None
    for step in range(vectors.shape[-1]):
        column = vectors[..., step : step + 1]
        if basis is not None:
            for _ in range(2):
                column = column - basis @ (basis.mT @ column)
        column = column / (column * column).sum(dim=-2, keepdim=True).sqrt()
        basis = column if basis is None else torch.cat([basis, column], dim=-1)
    return vectors if basis is None else basis
