"""A Linear with adapters: `y = (x + (x F^T) R) W^T + b`, with the factors of its chain of reflections.

`Q^T` acts on the rows of the input: `x Q^T = x + (x F^T) R` (`functional/factors.py`). `W Q` itself is never computed.
The second term of the output can also be computed on the output side, as `(x F^T) (R W^T)`. The product `R W^T` costs
about as much as `k` rows. But if `x` does not need a gradient, as in the first layers of a model, it does not need a
product with `W` in the backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.functional.factors import Factors
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.running import factors_for
from hra_fx.layers.target import REFLECTION

# From this number of rows per vector, `(x F^T) (R W^T)` is cheaper than to reflect `x` first, as measured on CPUs.
_MIN_ROWS_PER_VECTOR = 4


class LinearAdapters(HouseholderAdapters):
    """The adapters of a Linear. In a graph, the child computes the reflected input: `x -> x Q^T`."""

    reflects_input = True
    replaces_input = True

    def second_argument(self, x: Tensor, factors: Factors | None) -> Tensor:
        """The input after the reflections, with the same shape and dtype."""
        return x if factors is None else reflect_rows(x, factors)

    def value_in_graph(self, x: Tensor, output: Tensor) -> Tensor:
        """A fake tensor like the result of a call, from fake tensors of the layer's input and output."""
        return x


class AdaptedLinear(AdaptedLayer):
    """A Linear that reflects its input. In a graph, the input is reflected already."""

    hra_u: LinearAdapters
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Compute the Linear with `W Q`."""

        @functools.wraps(base.forward)
        def forward(self: Any, input: Tensor, *, reflected: bool = False) -> Any:
            adapters: Any = self._modules[REFLECTION]
            own = self._parameters
            weight = own["weight"] if "weight" in own else adapters.weight_of(self)
            bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401  # `get` would always read self.bias
            if adapters.fan_in_fan_out:  # transformers' `Conv1D`
                weight = weight.mT
            factors = None if reflected else factors_for(adapters, input)
            return F.linear(input, weight, bias) if factors is None else linear(input, factors, weight, bias)

        return {**super().wrap(base), "forward": forward}


def linear(x: Tensor, factors: Factors, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a Linear of `x: (..., d)` with the weight `W Q`, for factors in the dtype of the products."""
    rows, down = factors
    if x.dtype is not rows.dtype or x.is_nested:
        return F.linear(reflect_rows(x, factors), weight, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    output_side = rows.requires_grad and not x.requires_grad and weight.dtype is x.dtype and not weight.requires_grad
    # A compiler would add a guard on the number of rows and compile twice.
    if output_side and (torch.compiler.is_compiling() or x.numel() >= _MIN_ROWS_PER_VECTOR * rows.numel()):
        output = torch.addmm(F.linear(flat, weight, bias), F.linear(flat, down), torch.mm(rows, weight.mT))
    else:
        output = F.linear(torch.addmm(flat, F.linear(flat, down), rows), weight, bias)
    return output if flat is x else output.view(*x.shape[:-1], weight.shape[0])


def reflect_rows(x: Tensor, factors: Factors) -> Tensor:
    """Apply a chain to rows `(..., d)`: `x Q^T`, in the dtype of `x`. The products use the dtype of the factors."""
    rows, down = factors
    if x.dtype is not rows.dtype or x.is_nested:
        return x + (F.linear(x.to(rows.dtype), down) @ rows).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    return torch.addmm(flat, F.linear(flat, down), rows).view(x.shape)
