r"""The two matrices of an adapted convolution as one autograd node: `F = T U^T` (down) and `D = -W U` (up).

With `W` seen as `(out, d)`, `(W Q) p = W p + D (F p)` for a patch `p`. With gradients `dF` and `dD`:

    dU^T = T^T dF - dD^T W + (S + S^T) U^T,        S = - M o (T^T (dF U) T^T)

with `M` of `hra_fx.kernels.backward`. `W` is frozen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.backward import down_projection
from hra_fx.kernels.dispatch import are_plain_tensors, products_dtype
from hra_fx.kernels.wy_factor import gram_mask, scaled_chain_and_factor


def supports_fused(x: Tensor, vectors: Tensor, weight: Tensor) -> bool:
    """Whether `conv_projections` supports these in plain eager mode: a frozen weight of the dtype of the input."""
    same_dtype = x.dtype is weight.dtype and products_dtype(x) is x.dtype
    return same_dtype and not weight.requires_grad and are_plain_tensors(x, vectors, weight)


def conv_projections(vectors: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The down- and up-projection of an adapted convolution.

    Args:
        vectors: `U: (d, k)`, of any lengths.
        weight: `W: (out, d)`, frozen.

    Returns:
        `F: (k, d)` and `D: (out, k)`, in the dtype of the weight.

    Example:
        >>> down, up = conv_projections(torch.tensor([[3.0], [0.0]]), torch.eye(2))
        >>> torch.eye(2) + up @ down
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """
    with householder.without_autocast(weight):
        chain, factor = scaled_chain_and_factor(vectors, weight.dtype)
        return _ConvProjections.apply(chain, factor, weight)  # type: ignore[no-any-return, no-untyped-call]


def up_projection(chain: Tensor, weight: Tensor) -> Tensor:
    """`D = -W U: (out, k)`, for `U: (d, k)` in the dtype of `W: (out, d)`; without gradients.

    Example:
        >>> up_projection(torch.tensor([[3.0], [0.0]]), torch.eye(2))
        tensor([[-3.],
                [-0.]])
    """
    return torch.mm(chain.mT, weight.mT).neg_().mT.contiguous()


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


class _ConvProjections(torch.autograd.Function):
    """`(U, T, W) -> (T U^T, -W U)`, where `T` is the factor of `U`."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, factor: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(chain, factor, weight)
        down = down_projection(chain, factor, weight.dtype)
        return down, up_projection(chain.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, down_grad: Tensor, up_grad: Tensor) -> tuple[Tensor | None, None, None]:
        chain, factor, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradient(chain, weight, down_grad, up_grad), None, None
        with householder.without_autocast(chain):
            wide = down_grad.to(factor.dtype)
            total = torch.mm(factor.mT, wide).to(chain.dtype).sub_(torch.mm(up_grad.mT, weight))
            inner = torch.mm(torch.mm(factor.mT, torch.mm(wide, chain.to(factor.dtype))), factor.mT).to(chain.dtype)
            inner.mul_(gram_mask(inner))
            return total.addmm_(inner + inner.mT, chain.mT, alpha=-1).mT, None, None


def _differentiable_gradient(chain: Tensor, weight: Tensor, down_grad: Tensor, up_grad: Tensor) -> Tensor:
    """The gradient of the plain formula, which can be differentiated again."""
    factor = householder.compact_wy(chain)
    outputs = (factor @ chain.to(factor.dtype).mT).to(weight.dtype), -(weight @ chain.to(weight.dtype))
    (gradient,) = torch.autograd.grad(outputs, chain, (down_grad, up_grad), create_graph=True)
    return gradient
