r"""The factor `T` and Gram-Schmidt in products alone, for exporters: their runtimes have no solver and no QR.

Everything here is made of products, sums and comparisons of core aten, and can be differentiated. The number of steps
is a matter of the shape, so the graph has no loops.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_factor(chain: Tensor) -> Tensor:
    r"""`T: (k, k)` of a chain, by doubling: the inverse of blocks on the diagonal gives that of blocks twice as big.

        T^-1 = D + N,    X_0 = D^-1,    X <- X - X (N o M_s) X    for s = 1, 2, 4, ... < k

    with `M_s` the upper right `s x s` part of each `2s x 2s` block on the diagonal. With `X = diag(A^-1, C^-1)` that is
    the inverse of `[A B; 0 C]`, which has `-A^-1 B C^-1` in its corner. As accurate as a triangular solve, where the
    shorter `(I - N)(I + N^2)(I + N^4) ...` loses all digits for near-parallel columns.

    Args:
        chain: `U: (d, k)`, in the dtype to compute in.

    Returns:
        What `hra_fx.functional.householder.compact_wy` gives.

    Example:
        >>> U = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        >>> inverse_factor(U)
        tensor([[ 2., -2.],
                [ 0.,  1.]])
    """
    squares = (chain * chain).sum(dim=0)
    halves = torch.where(squares > torch.finfo(chain.dtype).tiny, squares / 2, 1.0)
    place = torch.arange(chain.shape[1], device=chain.device)
    row, column = place.unsqueeze(1), place.unsqueeze(0)
    upper = torch.where(row < column, chain.mT @ chain, 0.0)
    inverse = torch.where(row == column, halves.reciprocal(), 0.0)
    # Its highest bit says in which step a place is the corner of a block.
    apart = row ^ column
    size = 1
    while size < chain.shape[1]:
        corner = (apart >= size) & (apart < 2 * size)
        inverse = inverse - inverse @ torch.where(corner, upper, 0.0) @ inverse
        size *= 2
    return inverse


def gram_schmidt(vectors: Tensor) -> Tensor:
    """The orthonormal `V: (d, r)` of `U = V R` with a positive diagonal of `R`, by the recurrence, each step run twice.

    Once, it loses orthogonality with the square of the condition number; the second run takes what rounding left of the
    first ("twice is enough", Giraud and others 2005, https://doi.org/10.1007/s00211-005-0615-4).

    Args:
        vectors: `U: (d, r)` of full column rank, in the dtype to compute in; of lengths whose squares are in range.

    Returns:
        What `hra_fx.functional.householder.orthonormalize` gives.

    Example:
        >>> gram_schmidt(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    basis: Tensor | None = None
    for step in range(vectors.shape[1]):
        column = vectors[:, step : step + 1]
        if basis is not None:
            for _ in range(2):
                column = column - basis @ (basis.mT @ column)
        column = column / (column * column).sum(dim=0).sqrt()
        basis = column if basis is None else torch.cat([basis, column], dim=1)
    return vectors if basis is None else basis
