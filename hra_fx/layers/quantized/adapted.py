"""The container and the class of an adapted quantized layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from hra_fx.layers.linear import AdaptedLinear, LinearAdapters, reflect_rows
from hra_fx.layers.quantized.libraries import LinearMap, quant_scheme_of
from hra_fx.layers.running import factors_for
from hra_fx.layers.target import REFLECTION


class QuantizedAdapters(LinearAdapters):
    """Reflects the input of a Linear with a quantized weight. Only other readers of the weight need its values."""

    def rotate(self, weight: Tensor) -> Tensor:
        """Compute `W Q` for the quantized weight of the layer."""
        return super().rotate(weight.dequantize())


class AdaptedQuantizedLinear(AdaptedLinear):
    """A quantized Linear that reflects its input, and computes its gradient, whether or not the library does.

    It is the straight-through estimator: with `y = W x` for the dequantized weight, the gradient of `x` is `W^T`
    times the gradient of `y`. If inputs are also quantized, the backward pass ignores their rounding, as in
    quantization-aware training (Bengio et al., 2013, https://arxiv.org/abs/1308.3432).
    """

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Call the forward of the library with the reflected input."""
        is_torchao = base.forward is nn.Linear.forward

        @functools.wraps(base.forward)
        def forward(self: Any, input: Tensor, *, reflected: bool = False) -> Any:
            factors = None if reflected else factors_for(self.hra_u, input)
            x = input if factors is None else reflect_rows(input, factors)
            given = x.detach()
            output = F.linear(given, self.hra_base, self.bias) if is_torchao else base.forward(self, given)
            if torch.is_grad_enabled() and x.requires_grad:
                return _StraightThrough.apply(output, x, self, quant_scheme_of(self))  # type: ignore[no-untyped-call]
            return output

        if is_torchao:  # code may read its weight; that of other libraries is packed
            return {**super().wrap(base), "forward": forward}
        # bitsandbytes would change the layout of the weight (see `BitsAndBytes`).
        own = {"forward": forward, "support_avx512bf16_for_cpu": property(lambda self: False)}
        if base.state_dict is not nn.Module.state_dict:
            own["state_dict"] = functools.partialmethod(_whole_state_dict, base)
        return own


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: nn.Module, scheme: LinearMap) -> Tensor:
        ctx.layer, ctx.scheme, ctx.dtype = layer, scheme, x.dtype
        is_plain = is_dynamo_compiling() or not output.is_inference()  # that of some kernels is
        return output.view_as(output) if is_plain else output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weight = ctx.scheme.values(ctx.layer).to(grad.dtype)
        return grad, (grad @ weight).to(ctx.dtype), None, None


def _whole_state_dict(
    self: Any, base: Any, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
) -> dict[str, Any]:
    """The state of a class with its own `state_dict`, which leaves out children (HQQ), with the adapters."""
    state: dict[str, Any] = {} if destination is None else destination
    base.state_dict(self, destination=state, prefix=prefix, keep_vars=keep_vars)
    self.hra_u.state_dict(destination=state, prefix=f"{prefix}{REFLECTION}.", keep_vars=keep_vars)
    return state
