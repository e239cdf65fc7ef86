r"""An adapted Linear as one autograd node, `y = x Q^T W^T + b`, computed on its input side or its output side.

Input side: `y = h W^T + b` with `h = x Q^T` (`hra_fx.kernels.backward`). Output side, with `B = W U`, as in LoRA:

    y = x W^T - Z B^T,        R = G B T,        dL/dx = G W - R U^T,        dL/dU = U (S + S^T) - x^T R - W^T (G^T Z)

for the gradient `G` of `y`. The output side needs two more skinny products with `W`, which cost about as much as `2 k`
rows. If `x` needs no gradient (in the first layers of a model) it avoids the product `G W`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.compat import is_view
from hra_fx.functional import householder
from hra_fx.kernels.backward import (
    down_projection,
    project_grad,
    subtract_low_rank,
    subtract_matmul_,
    wy_factor_grad,
)
from hra_fx.kernels.dispatch import are_plain_tensors, products_dtype
from hra_fx.kernels.double_backward import differentiable_gradients
from hra_fx.kernels.wy_factor import scaled_chain_and_factor

# The number of rows per vector from which the two skinny products are cheaper than `G W`, as measured on CPUs.
_MIN_ROWS_PER_VECTOR = 4


def supports_fused(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` supports these in plain eager mode: frozen weight and bias, of the dtype of the input."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    tensors = (vectors, weight) if bias is None else (vectors, weight, bias)
    return frozen and x.dtype is weight.dtype and are_plain_tensors(x, *tensors) and products_dtype(x) is x.dtype


def linear(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear with the weight `W Q`; see `supports_fused`.

    Args:
        x: `(..., d)`.
        vectors: `U: (d, k)`, of any lengths.
        weight: `W: (out, d)`.
        bias: `(out,)`.

    Returns:
        `(..., out)`.

    Example:
        >>> linear(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]), torch.eye(2), None)
        tensor([[-2.,  5.]])
    """
    with householder.without_autocast(x):
        chain, factor = scaled_chain_and_factor(vectors, x.dtype)
        node = _OutputSide if prefer_output_side(x, chain) else _InputSide
        return node.apply(x, chain, factor, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def prefer_output_side(x: Tensor, chain: Tensor) -> bool:
    """Whether the output side is cheaper: only the vectors need a gradient, and there are many rows."""
    width, size = chain.shape
    only_vectors = chain.requires_grad and not x.requires_grad and torch.is_grad_enabled()
    return only_vectors and x.numel() >= _MIN_ROWS_PER_VECTOR * size * width


class _InputSide(torch.autograd.Function):
    """`(x, U, T, W, b) -> (x - x U T^T U^T) W^T + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.reshape(-1, x.shape[-1]), chain.to(x.dtype).mT
        projected = torch.mm(down_projection(chain, factor, x.dtype), rows.mT)
        ctx.save_for_backward(x, chain, factor, weight, projected, bias)
        return _plain(subtract_low_rank(rows, projected, columns).view(x.shape), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, chain, factor, weight, projected, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(ctx, x, chain, weight, bias, grad)
        with householder.without_autocast(x):
            columns = chain.to(x.dtype).mT
            rows_grad = torch.mm(grad.reshape(-1, grad.shape[-1]), weight)
            projected_grad = project_grad(rows_grad, columns, factor)
            low, chain_grad = projected_grad.to(x.dtype), None
            if ctx.needs_input_grad[1]:
                total = wy_factor_grad(projected, projected_grad, chain)
                total = subtract_matmul_(total, low, x.reshape(-1, x.shape[-1]))
                chain_grad = subtract_matmul_(total, projected, rows_grad).mT
            if not ctx.needs_input_grad[0]:
                return None, chain_grad, None, None, None
            return rows_grad.addmm_(low.mT, columns, alpha=-1).view(x.shape), chain_grad, None, None, None


class _OutputSide(torch.autograd.Function):
    """`(x, U, T, W, b) -> x W^T + b - (x U T^T) (W U)^T`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.reshape(-1, x.shape[-1]), chain.to(x.dtype).mT
        output = _plain(x, weight, bias)
        image = torch.mm(columns, weight.mT)
        projected = torch.mm(down_projection(chain, factor, x.dtype), rows.mT)
        ctx.save_for_backward(x, chain, factor, weight, projected, bias, image)
        output.view(-1, weight.shape[0]).addmm_(projected.mT, image, alpha=-1)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, chain, factor, weight, projected, bias, image = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(ctx, x, chain, weight, bias, grad)
        with householder.without_autocast(x):
            output_grad = grad.reshape(-1, grad.shape[-1])
            projected_grad = project_grad(output_grad, image, factor)
            low, chain_grad = projected_grad.to(x.dtype), None
            if ctx.needs_input_grad[1]:
                total = wy_factor_grad(projected, projected_grad, chain)
                total = subtract_matmul_(total, low, x.reshape(-1, x.shape[-1]))
                chain_grad = subtract_matmul_(total, torch.mm(projected, output_grad), weight).mT
            if not ctx.needs_input_grad[0]:
                return None, chain_grad, None, None, None
            x_grad = torch.mm(output_grad, weight).addmm_(low.mT, chain.to(x.dtype).mT, alpha=-1)
            return x_grad.view(x.shape), chain_grad, None, None, None


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, never a view: views made in an autograd function cannot be modified in place."""
    output = F.linear(x, weight, bias)
    return output.clone() if is_view(output) else output


def _differentiable_gradients(
    ctx: Any, x: Tensor, chain: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    gradients = differentiable_gradients(needed, x, chain, grad, lambda rows: F.linear(rows, weight, bias))
    return *gradients, None, None, None
