"""The gradient of a quantized layer's input, if the library does not compute one: the straight-through estimator.

With `y = W x` for the dequantized weight, the gradient of `x` is `W^T` times the gradient of `y`. If inputs are also
quantized, the backward pass ignores their rounding, as in quantization-aware training (Bengio et al., 2013,
https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.quantized.detect import quant_scheme_of
from hra_fx.layers.quantized.scheme import QuantScheme


def call_quantized(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Any]) -> Any:
    """Call a quantized layer. Its input always gets a gradient, whatever the library does.

    Args:
        layer: the layer.
        x: `(..., d)`, the input of the layer.
        run: the library's own forward of the layer.

    Returns:
        `(..., out)`.
    """
    scheme = quant_scheme_of(layer)
    if scheme is None:  # another tool has set another weight
        return run(x)
    made = scheme.straight_through and torch.is_grad_enabled() and x.requires_grad
    with scheme.called(layer):
        output = run(x.detach() if made else x)
    return straight_through(output, x, layer, scheme) if made else output


def straight_through(output: Tensor, x: Tensor, layer: nn.Module, scheme: QuantScheme) -> Tensor:
    """Connect the output of a layer to its input for autograd.

    Args:
        output: `(..., out)`, which does not depend on `x` for autograd.
        x: `(..., d)`, the input of the layer.
        layer: the layer; its weight is dequantized in the backward pass.
        scheme: its quantization scheme.

    Returns:
        `output`, with a gradient to `output` and to `x`.
    """
    passed: Tensor = _StraightThrough.apply(output, x, layer, scheme)  # type: ignore[no-untyped-call]
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: nn.Module, scheme: QuantScheme) -> Tensor:
        ctx.layer, ctx.scheme, ctx.dtype = layer, scheme, x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weight = ctx.scheme.values(ctx.layer).to(grad.dtype)
        return grad, (grad @ weight).to(ctx.dtype), None, None
