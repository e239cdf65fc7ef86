r"""A whole Linear over reflected rows as one node, `y = x Q^T W^T + b`, by its input or its output.

By the input: `y = h W^T` with `h = x Q^T` (`hra_fx.kernels.backward`). By the output, with `B = W U`, as LoRA does:

    y = x W^T - Z B^T,        R = G B T,        dL/dx = G W - R U^T,        dL/dU = U (S + S^T) - x^T R - W^T (G^T Z)

for the gradient `G` of `y`. That takes two skinny products with `W` more, worth `2 k` rows of the layer, and where `x`
wants no gradient (in the first layers of a model) it saves all of `G W`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.compat import is_view
from hra_fx.functional import householder
from hra_fx.kernels.backward import apart, back_of, filters_of, minus, take
from hra_fx.kernels.dispatch import are_plain, products_dtype
from hra_fx.kernels.double_backward import plain_gradients
from hra_fx.kernels.wy_factor import bearable

# From how many rows for each vector on the skinny products with the weight cost less than `G W`: measured on CPUs.
_SAVING_A_PRODUCT = 4


def fits(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a Linear can be this node, while nobody looks on: it is frozen, and of the dtype of its input."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    tensors = (vectors, weight) if bias is None else (vectors, weight, bias)
    return frozen and x.dtype is weight.dtype and are_plain(x, *tensors) and products_dtype(x) is x.dtype


def linear(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear with the weight `W Q`, where `fits` says so.

    Args:
        x: `(..., d)`.
        vectors: `U: (d, k)`, of any length each.
        weight: `W: (out, d)`.
        bias: `(out,)`.

    Returns:
        `(..., out)`.

    Example:
        >>> linear(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]), torch.eye(2), None)
        tensor([[-2.,  5.]])
    """
    with householder.without_autocast(x):
        chain, factor = bearable(vectors, x.dtype)
        node = _ByOutput if is_by_output(x, chain) else _ByInput
        return node.apply(x, chain, factor, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def is_by_output(x: Tensor, chain: Tensor) -> bool:
    """Whether the output is the cheaper side: only the vectors want a gradient, and there are many rows."""
    width, size = chain.shape
    alone = chain.requires_grad and not x.requires_grad and torch.is_grad_enabled()
    return alone and x.numel() >= _SAVING_A_PRODUCT * size * width


class _ByInput(torch.autograd.Function):
    """`(x, U, T, W, b) -> (x - x U T^T U^T) W^T + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.reshape(-1, x.shape[-1]), chain.to(x.dtype).mT
        read = torch.mm(filters_of(chain, factor, x.dtype), rows.mT)
        ctx.save_for_backward(x, chain, factor, weight, read, bias)
        return _plain(minus(rows, read, columns).view(x.shape), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, chain, factor, weight, read, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # there may be a gradient of the gradient
            return _plain_gradients(ctx, x, chain, weight, bias, gradient)
        with householder.without_autocast(x):
            columns = chain.to(x.dtype).mT
            given = torch.mm(gradient.reshape(-1, gradient.shape[-1]), weight)
            back = back_of(given, columns, factor)
            low, of_chain = back.to(x.dtype), None
            if ctx.needs_input_grad[1]:
                total = take(apart(read, back, chain), low, x.reshape(-1, x.shape[-1]))
                of_chain = take(total, read, given).mT
            if not ctx.needs_input_grad[0]:
                return None, of_chain, None, None, None
            return given.addmm_(low.mT, columns, alpha=-1).view(x.shape), of_chain, None, None, None


class _ByOutput(torch.autograd.Function):
    """`(x, U, T, W, b) -> x W^T + b - (x U T^T) (W U)^T`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Tensor, factor: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.reshape(-1, x.shape[-1]), chain.to(x.dtype).mT
        output = _plain(x, weight, bias)
        image = torch.mm(columns, weight.mT)
        read = torch.mm(filters_of(chain, factor, x.dtype), rows.mT)
        ctx.save_for_backward(x, chain, factor, weight, read, bias, image)
        output.view(-1, weight.shape[0]).addmm_(read.mT, image, alpha=-1)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, chain, factor, weight, read, bias, image = ctx.saved_tensors
        if torch.is_grad_enabled():  # there may be a gradient of the gradient
            return _plain_gradients(ctx, x, chain, weight, bias, gradient)
        with householder.without_autocast(x):
            given = gradient.reshape(-1, gradient.shape[-1])
            back = back_of(given, image, factor)
            low, of_chain = back.to(x.dtype), None
            if ctx.needs_input_grad[1]:
                total = take(apart(read, back, chain), low, x.reshape(-1, x.shape[-1]))
                of_chain = take(total, torch.mm(read, given), weight).mT
            if not ctx.needs_input_grad[0]:
                return None, of_chain, None, None, None
            of_x = torch.mm(given, weight).addmm_(low.mT, chain.to(x.dtype).mT, alpha=-1)
            return of_x.view(x.shape), of_chain, None, None, None


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, and no view: what a node gives, others may write into."""
    output = F.linear(x, weight, bias)
    return output.clone() if is_view(output) else output


def _plain_gradients(
    ctx: Any, x: Tensor, chain: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    return *plain_gradients(wanted, x, chain, gradient, lambda rows: F.linear(rows, weight, bias)), None, None, None
