"""The gradient of a quantised layer's input, where the library gives none: straight through what it rounds.

`y = W x` for the weight as it is dequantised, so that the gradient of `x` is `W^T` times that of `y`. Where inputs are
quantised too, their rounding is taken for the identity, as in quantisation-aware training (Bengio et al., 2013,
https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.quantized.scheme import QuantScheme


def straight_through(output: Tensor, x: Tensor, layer: nn.Module, packing: QuantScheme) -> Tensor:
    """The output of a layer, with a gradient for its input.

    Args:
        output: `(..., out)`, which does not depend on `x` for autograd.
        x: `(..., d)`, what the layer has read.
        layer: the layer, whose weight is dequantised once the gradient comes.
        packing: how its weight is kept.

    Returns:
        `output`, of which the gradient goes to both.
    """
    passed: Tensor = _StraightThrough.apply(output, x, layer, packing)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: nn.Module, packing: QuantScheme) -> Tensor:
        ctx.layer, ctx.packing, ctx.dtype = layer, packing, x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weight = ctx.packing.values(ctx.layer).to(grad.dtype)
        return grad, (grad @ weight).to(ctx.dtype), None, None
