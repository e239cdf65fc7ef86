"""A convolution with adapters.

With `W` reshaped to `(out, d)` and a patch `p`, `W Q p = W p + (W R^T) (F p)`, with the factors of the chain. The right
parenthesis is the convolution itself with `k` other filters, and the left one a 1x1 convolution of its output. Patches
are not unfolded, and neither `W Q` nor the gradient of a weight is computed. Stride, padding and padding mode are those
of the layer at the time of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.functional.factors import Factors
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.running import factors_for
from hra_fx.layers.target import REFLECTION

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvAdapters(HouseholderAdapters):
    """The adapters of a convolution. In a graph, the child computes the factors."""

    reflects_input = True

    def second_argument(self, x: Tensor, factors: Factors | None) -> Factors | None:
        """The factors."""
        return factors

    def value_in_graph(self, x: Tensor, output: Tensor) -> Factors | None:
        """Fake tensors like the result of a call, from fake tensors of the layer's input and output."""
        rank = sum(self.specs[name].r for name in self.active or self.specs)
        return (x.new_empty((rank, self.width)), x.new_empty((rank, self.width))) if rank else None


class AdaptedConv(AdaptedLayer):
    """A convolution that adds the term of the reflections. A graph passes the factors."""

    hra_u: ConvAdapters
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Compute the convolution with `W Q`."""

        @functools.wraps(base.forward)
        def forward(self: Any, input: Tensor, *, reflected: Factors | None = None) -> Any:
            adapters: Any = self._modules[REFLECTION]
            weight = adapters.weight_of(self)
            output = self._conv_forward(input, weight, self.bias)
            factors = factors_for(adapters, input) if reflected is None else reflected
            return output if factors is None else output + _correction(self, input, weight, factors)

        return {**super().wrap(base), "forward": forward}


def _correction(conv: Any, x: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """`(W R^T) (F p)` for every patch `p` of the input and of each group."""
    rows, down = factors
    patch = weight.shape[1:]
    filters = down.reshape(-1, *patch).repeat(conv.groups, *(1 for _ in patch))
    mixing = (weight.flatten(1) @ rows.to(weight.dtype).mT).reshape(len(weight), -1, *(1 for _ in patch[1:]))
    return _CONVOLVE[len(patch) - 1](conv._conv_forward(x, filters, None), mixing, groups=conv.groups)
