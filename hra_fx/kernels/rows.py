"""Reflected rows, `x -> x Q^T`, as one node: for layers that compute with them in a way of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.backward import apart, back_of, filters_of, minus, take
from hra_fx.kernels.dispatch import products_dtype
from hra_fx.kernels.double_backward import plain_gradients
from hra_fx.kernels.wy_factor import bearable


def reflected(x: Tensor, vectors: Tensor) -> Tensor:
    """Rows turned by a chain.

    Args:
        x: `(..., d)`, floating.
        vectors: `U: (d, k)`, of any length each.

    Returns:
        `(..., d)` in the dtype of `x`; under autocast the products run in its dtype.

    Example:
        >>> reflected(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]))
        tensor([[-2.,  5.]])
    """
    dtype = products_dtype(x)
    with householder.without_autocast(x):
        chain, factor = bearable(vectors, dtype)
        turned: Tensor = _Reflected.apply(x, chain, factor, dtype)  # type: ignore[no-untyped-call]
    return turned


class _Reflected(torch.autograd.Function):
    """`(x, U, T, dtype of the products) -> x - x U T^T U^T`, where `T` is that of `U`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        columns = chain.to(dtype).mT
        read = torch.mm(filters_of(chain, factor, dtype), x.reshape(-1, x.shape[-1]).to(dtype).mT)
        ctx.save_for_backward(x, chain, factor, read)
        ctx.dtype = dtype
        return _turned_by(x, read, columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, chain, factor, read = ctx.saved_tensors
        if torch.is_grad_enabled():  # there may be a gradient of the gradient
            return *plain_gradients(ctx.needs_input_grad[:2], x, chain, gradient, lambda turned: turned), None, None
        with householder.without_autocast(x):
            rows, given = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
            narrow, columns = given.to(ctx.dtype), chain.to(ctx.dtype).mT
            back = back_of(narrow, columns, factor)
            of_x = minus(given, back, columns).view(x.shape) if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return of_x, None, None, None
            of_chain = take(apart(read, back, chain), back.to(ctx.dtype), rows.to(ctx.dtype))
            return of_x, take(of_chain, read, narrow).mT, None, None


def _turned_by(x: Tensor, read: Tensor, columns: Tensor) -> Tensor:
    """`minus` in the shape of `x`, and no view: what a node gives, others may write into."""
    if x.dim() == 2 and x.dtype is not columns.dtype:
        return minus(x, read, columns)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, flat = x.reshape(-1, x.shape[-1]), total.view(-1, x.shape[-1])
    if x.dtype is columns.dtype:
        torch.addmm(rows, read.to(columns.dtype).mT, columns, alpha=-1, out=flat)
    else:
        flat.copy_(minus(rows, read, columns))
    return total
