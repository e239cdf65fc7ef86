"""The gradient of a quantized layer's input, if the library has none: the straight-through estimator.

With `y = W x` for the dequantized weight, the gradient of `x` is `W^T` times that of `y`. If inputs are quantized too,
the backward pass ignores their rounding, as in quantization-aware training (Bengio et al., 2013,
https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.quantized.scheme import QuantScheme


def straight_through(output: Tensor, x: Tensor, layer: nn.Module, packing: QuantScheme) -> Tensor:
    """Connect the output of a layer to its input for autograd.

    Args:
        output: `(..., out)`, which does not depend on `x` for autograd.
        x: `(..., d)`, the input of the layer.
        layer: the layer; its weight is dequantized in the backward pass.
        packing: its quantization scheme.

    Returns:
        `output`, with a gradient to `output` and to `x`.
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
