r"""What a convolution is corrected by, as one node: `F = T U^T` reads patches, and `D = -W U` draws them.

With `W` seen as `(out, d)`, `(W Q) p = W p + D (F p)` for a patch `p`. For gradients `dF` and `dD`:

    dU^T = T^T dF - dD^T W + (S + S^T) U^T,        S = - M o (T^T (dF U) T^T)

with `M` of `hra_fx.kernels.backward`. `W` is frozen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.backward import filters_of
from hra_fx.kernels.dispatch import are_plain, products_dtype
from hra_fx.kernels.wy_factor import bearable, mask_like


def fits(x: Tensor, vectors: Tensor, weight: Tensor) -> bool:
    """Whether a convolution can be corrected by these, while nobody looks on: frozen, and of the dtype of its input."""
    same = x.dtype is weight.dtype and products_dtype(x) is x.dtype
    return same and not weight.requires_grad and are_plain(x, vectors, weight)


def filters_and_drawing(vectors: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrices that a convolution is corrected by.

    Args:
        vectors: `U: (d, k)`, of any length each.
        weight: `W: (out, d)`, frozen.

    Returns:
        `F: (k, d)` and `D: (out, k)`, in the dtype of the weight.

    Example:
        >>> filters, drawing = filters_and_drawing(torch.tensor([[3.0], [0.0]]), torch.eye(2))
        >>> torch.eye(2) + drawing @ filters
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """
    with householder.without_autocast(weight):
        chain, factor = bearable(vectors, weight.dtype)
        return _Made.apply(chain, factor, weight)  # type: ignore[no-any-return, no-untyped-call]


def drawing_of(chain: Tensor, weight: Tensor) -> Tensor:
    """`D = -W U: (out, k)`, for `U: (d, k)` in the dtype of `W: (out, d)`; without gradients.

    Example:
        >>> drawing_of(torch.tensor([[3.0], [0.0]]), torch.eye(2))
        tensor([[-3.],
                [-0.]])
    """
    return torch.mm(chain.mT, weight.mT).neg_().mT.contiguous()


def drawn_onto(output: Tensor, drawing: Tensor, coordinates: Tensor, dimensions: int) -> Tensor:
    """`y + D z` at every place, as a product: a convolution of one place takes several times as long.

    Args:
        output: `y: (n, out, ...)` or `(out, ...)`, contiguous; written into where nobody wants a gradient.
        drawing: `D: (out, k)`.
        coordinates: `z: (n, k, ...)` or `(k, ...)`, of the same places.
        dimensions: that of places.

    Example:
        >>> drawn_onto(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), torch.full((1, 1), 2.0), 1)
        tensor([[2.],
                [6.]])
    """
    size, places = output.shape[0] if output.dim() > dimensions + 1 else 1, math.prod(output.shape[-dimensions:])
    flat, read = (
        part.reshape(size, k, places) for part, k in ((output, drawing.shape[0]), (coordinates, drawing.shape[1]))
    )
    mixing = drawing.expand(size, -1, -1)
    if torch.is_grad_enabled() and any(part.requires_grad for part in (output, drawing, coordinates)):
        return torch.baddbmm(flat, mixing, read).view(output.shape)
    flat.baddbmm_(mixing, read)
    return output


class _Made(torch.autograd.Function):
    """`(U, T, W) -> (T U^T, -W U)`, where `T` is that of `U`."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, factor: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(chain, factor, weight)
        filters = filters_of(chain, factor, weight.dtype)
        return filters, drawing_of(chain.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, of_filters: Tensor, of_drawing: Tensor) -> tuple[Tensor | None, None, None]:
        chain, factor, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # there may be a gradient of the gradient
            return _plain_gradient(chain, weight, of_filters, of_drawing), None, None
        with householder.without_autocast(chain):
            given = of_filters.to(factor.dtype)
            total = torch.mm(factor.mT, given).to(chain.dtype).sub_(torch.mm(of_drawing.mT, weight))
            inner = torch.mm(torch.mm(factor.mT, torch.mm(given, chain.to(factor.dtype))), factor.mT).to(chain.dtype)
            inner.mul_(mask_like(inner))
            return total.addmm_(inner + inner.mT, chain.mT, alpha=-1).mT, None, None


def _plain_gradient(chain: Tensor, weight: Tensor, of_filters: Tensor, of_drawing: Tensor) -> Tensor:
    """The gradient of the plain formula, which can be differentiated again."""
    factor = householder.compact_wy(chain)
    made = (factor @ chain.to(factor.dtype).mT).to(weight.dtype), -(weight @ chain.to(weight.dtype))
    (found,) = torch.autograd.grad(made, chain, (of_filters, of_drawing), create_graph=True)
    return found
