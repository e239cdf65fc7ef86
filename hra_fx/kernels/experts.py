"""Products with the rotated weights of experts, `W_e Q_e`: the inputs are reflected, and the weights are not changed.

`reflect_groups` takes the function that multiplies, so that it uses the same kernel as its caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import reflect_rows

#: Kernels for grouped products need rows with a multiple of 16 bytes.
_ALIGNMENT = 16


def reflect_each(x: Tensor, factors: Factors) -> Tensor:
    """Reflect the rows of each matrix by its own chain, `X_i Q_i^T`.

    Args:
        x: `(n, rows, d)`, or `(..., d)` for a single chain.
        factors: `R` and `F: (n, k, d)`, or `(k, d)`; the products use their dtype.

    Returns:
        A tensor of the shape and dtype of `x`.

    Example:
        >>> from hra_fx.kernels.factors import wy_factors
        >>> factors = Factors(*wy_factors(torch.tensor([[[3.0], [0.0]], [[0.0], [1.0]]])).unbind(dim=1))
        >>> reflect_each(torch.tensor([[[2.0, 5.0]], [[2.0, 5.0]]]), factors)
        tensor([[[-2.,  5.]],
        <BLANKLINE>
                [[ 2., -5.]]])
    """
    rows, down = factors
    if rows.dim() == 2:
        return reflect_rows(x, factors)
    if x.dtype is rows.dtype:
        return torch.baddbmm(x, torch.bmm(x, down.mT), rows)
    return x + torch.bmm(torch.bmm(x.to(rows.dtype), down.mT), rows).to(x.dtype)


def reflect_groups(x: Tensor, factors: Factors, multiply: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """Reflect rows that are sorted by expert, each by the chain of its expert.

    Args:
        x: `(n, d)`.
        factors: `R` and `F: (experts, k, d)`, in the dtype of `x`.
        multiply: the grouped product of rows `(n, a)` with matrices `(experts, a, b)`.

    Returns:
        `(n, d)`.
    """
    step = _ALIGNMENT // x.element_size()
    missing = -factors.rows.shape[1] % step
    rows, down = (F.pad(factor, (0, 0, 0, missing)) for factor in factors)
    reflected: Tensor = x + multiply(multiply(x, down.mT), rows)
    return reflected


class GatheredProduct(torch.autograd.Function):
    """`X_i W_i` or `X_i W_i^T`, with frozen weights that were gathered from all experts, one for each `X_i`.

    The backward pass gathers the weights again. A plain product would keep a copy of a weight for each token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: Tensor, weight: Tensor, index: Tensor, transposed: bool) -> Tensor:
        """Multiply `X: (n, rows, a)` by `W = weight[index]: (n, a, b)`, or `(n, b, a)` if transposed."""
        ctx.save_for_backward(weight, index)
        ctx.transposed = transposed
        return torch.bmm(x, gathered.mT if transposed else gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Compute the gradient of `X`."""
        weight, index = ctx.saved_tensors
        gathered = weight[index]
        return torch.bmm(gradients[0], gathered if ctx.transposed else gathered.mT), None, None, None, None
