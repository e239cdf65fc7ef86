"""Call a layer of another library, with a gradient for its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.quantized.find import quant_scheme_of
from hra_fx.layers.quantized.scheme import QuantScheme


def call_quantized(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Any]) -> Any:
    """Call a quantized layer with `run`, the library's own forward. Its input `x` always gets a gradient.

    If the library does not compute it, this is the straight-through estimator. With `y = W x` for the dequantized
    weight, the gradient of `x` is `W^T` times the gradient of `y`. If inputs are also quantized, the backward pass
    ignores their rounding, as in quantization-aware training (Bengio et al., 2013, https://arxiv.org/abs/1308.3432).
    """
    scheme = quant_scheme_of(layer)
    if scheme is None:  # another tool has set another weight
        return run(x)
    wanted = torch.is_grad_enabled() and x.requires_grad
    with scheme.called(layer):
        output = run(x.detach() if wanted and scheme.straight_through else x)
    if wanted and not output.requires_grad:
        return _StraightThrough.apply(output, x, layer, scheme)  # type: ignore[no-untyped-call]
    return output


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: nn.Module, scheme: QuantScheme) -> Tensor:
        ctx.layer, ctx.scheme, ctx.dtype = layer, scheme, x.dtype
        return output.clone() if output.is_inference() else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weight = ctx.scheme.values(ctx.layer).to(grad.dtype)
        return grad, (grad @ weight).to(ctx.dtype), None, None
