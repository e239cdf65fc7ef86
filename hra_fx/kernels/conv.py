r"""The correction of an adapted convolution, from the factors `R` and `F` of its adapters (`hra_fx.kernels.factors`).

With `W` seen as `(out, d)`, `(W Q) p = W p + (W R^T) (F p)` for a patch `p`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def up_projection(rows: Tensor, weight: Tensor) -> Tensor:
    """`D = W R^T: (out, k)`, for `R: (k, d)` in the dtype of `W: (out, ...)`.

    Example:
        >>> up_projection(torch.tensor([[1.0, 0.0]]), torch.eye(2))
        tensor([[1.],
                [0.]])
    """
    return torch.mm(rows, weight.flatten(1).mT).mT


def add_up_projection(output: Tensor, up: Tensor, projected: Tensor, dimensions: int) -> Tensor:
    """`y + D z` at each position, as a matrix product; a 1x1 convolution takes several times as long.

    Args:
        output: `y: (n, out, ...)` or `(out, ...)`, contiguous; modified in place if no gradient is needed.
        up: `D: (out, k)`.
        projected: `z: (n, k, ...)` or `(k, ...)`, of the same positions.
        dimensions: number of spatial dimensions.

    Example:
        >>> add_up_projection(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), torch.full((1, 1), 2.0), 1)
        tensor([[2.],
                [6.]])
    """
    batch, positions = output.shape[0] if output.dim() > dimensions + 1 else 1, math.prod(output.shape[-dimensions:])
    flat, low = (
        tensor.reshape(batch, channels, positions)
        for tensor, channels in ((output, up.shape[0]), (projected, up.shape[1]))
    )
    matrices = up.expand(batch, -1, -1)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (output, up, projected)):
        return torch.baddbmm(flat, matrices, low).view(output.shape)
    flat.baddbmm_(matrices, low)
    return output
