"""Reflected rows, `x -> x Q^T`, as one autograd node, for layers whose own forward is called with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.backward import down_projection, project_grad, subtract_low_rank, subtract_matmul_, wy_factor_grad
from hra_fx.kernels.dispatch import products_dtype
from hra_fx.kernels.double_backward import differentiable_gradients
from hra_fx.kernels.wy_factor import scaled_chain_and_factor


def reflect_rows(x: Tensor, vectors: Tensor) -> Tensor:
    """Apply a chain to rows: `x Q^T`.

    Args:
        x: `(..., d)`, floating.
        vectors: `U: (d, k)`, of any lengths.

    Returns:
        `(..., d)` in the dtype of `x`; under autocast the products run in the dtype of autocast.

    Example:
        >>> reflect_rows(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]))
        tensor([[-2.,  5.]])
    """
    dtype = products_dtype(x)
    with householder.without_autocast(x):
        chain, factor = scaled_chain_and_factor(vectors, dtype)
        output: Tensor = _ReflectRows.apply(x, chain, factor, dtype)  # type: ignore[no-untyped-call]
    return output


class _ReflectRows(torch.autograd.Function):
    """`(x, U, T, dtype of the products) -> x - x U T^T U^T`, where `T` is the factor of `U`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        columns = chain.to(dtype).mT
        projected = torch.mm(down_projection(chain, factor, dtype), x.reshape(-1, x.shape[-1]).to(dtype).mT)
        ctx.save_for_backward(x, chain, factor, projected)
        ctx.dtype = dtype
        return _subtract(x, projected, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, chain, factor, projected = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *differentiable_gradients(ctx.needs_input_grad[:2], x, chain, grad, lambda rows: rows), None, None
        with householder.without_autocast(x):
            rows, upstream = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
            grad_rows, columns = upstream.to(ctx.dtype), chain.to(ctx.dtype).mT
            projected_grad = project_grad(grad_rows, columns, factor)
            x_grad = None
            if ctx.needs_input_grad[0]:
                x_grad = subtract_low_rank(upstream, projected_grad, columns).view(x.shape)
            if not ctx.needs_input_grad[1]:
                return x_grad, None, None, None
            total = wy_factor_grad(projected, projected_grad, chain)
            total = subtract_matmul_(total, projected_grad.to(ctx.dtype), rows.to(ctx.dtype))
            return x_grad, subtract_matmul_(total, projected, grad_rows).mT, None, None


def _subtract(x: Tensor, projected: Tensor, columns: Tensor) -> Tensor:
    """`subtract_low_rank` in the shape of `x`, never a view: views made here could not be modified in place."""
    if x.dim() == 2 and x.dtype is not columns.dtype:
        return subtract_low_rank(x, projected, columns)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, flat = x.reshape(-1, x.shape[-1]), total.view(-1, x.shape[-1])
    if x.dtype is columns.dtype:
        torch.addmm(rows, projected.to(columns.dtype).mT, columns, alpha=-1, out=flat)
    else:
        flat.copy_(subtract_low_rank(rows, projected, columns))
    return total
