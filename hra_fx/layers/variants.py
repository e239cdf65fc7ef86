r"""Variants of the forward pass: a layer applies its reflections to the rows of its input, or to the patches.

Both give the result for `W Q`, with `W` reshaped to `(out, d)`, at the cost of two thin matrix products. `W Q` itself
is never computed. A layer with its own forward reads `W Q` (`hra_fx.layers.weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.functional import householder
from hra_fx.kernels.dispatch import products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import reflect_rows
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.batching import factors_for, factors_of, uses_factors
from hra_fx.layers.target import full_shape, kind_of, width_of

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LinearAdapters(HouseholderAdapters):
    """Reflects the input of a Linear: `x -> x Q^T`."""

    reflects_input = True

    def value_in_graph(self, x: Tensor, output: Tensor) -> Tensor:
        """A fake tensor like the result of `reflect`, from fake tensors of the layer's input and output."""
        return x

    def reflect(self, x: Tensor) -> Tensor:
        """Reflect `x: (..., d)`; the result has the same shape and dtype."""
        if uses_factors(self, x):
            factors = factors_of(self, products_dtype(x.device, x.dtype))
            return x if factors is None else reflect_rows(x, factors)
        # Of `factors_in_exported_batches`.
        exported: Factors | None = self.traced if compat.is_exporting() else None
        if exported is not None:
            return x + (x @ exported.down.to(x.dtype).mT) @ exported.rows.to(x.dtype)
        vectors = self.vectors_for(x)
        if vectors is None:
            return x
        chain = householder.normalize(vectors)
        return householder.reflect(x, chain, householder.compact_wy(chain))


class ConvAdapters(HouseholderAdapters):
    """Computes the correction of a convolution's output.

    With `W` reshaped to `(out, d)` and a patch `p`, `(W Q) p = W p - (W U) (T U^T p)`. The right parenthesis is a
    convolution with `k` filters, which is computed here. The layer applies the 1x1 convolution `W U` to it (`project`)
    and subtracts the result. Patches are not unfolded, and neither the rotated weight nor the gradient of a weight is
    computed.
    """

    reflects_input = True

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        """Create an empty container for a convolution."""
        super().__init__(width_of(conv), kind_of(conv))
        self.patch = tuple(full_shape(conv.weight)[1:])
        # Not a child: its parameters are those of the layer. Its stride, padding and padding mode may change.
        vars(self)["_conv"] = conv

    def _coordinates(self, x: Tensor, filters: Tensor) -> Tensor:
        """Apply filters `(k, d)` to the patches of every group: `(n, groups * k, ...)`."""
        conv: Any = vars(self)["_conv"]
        kernel = filters.reshape(-1, *self.patch).repeat(conv.groups, *(1 for _ in self.patch))
        return conv._conv_forward(x, kernel, None)  # type: ignore[no-any-return]

    def _image(self, coordinates: Tensor, mixing: Tensor) -> Tensor:
        """Apply `mixing: (out, k)` to the coordinates at each position: a 1x1 convolution."""
        filters = mixing.reshape(*mixing.shape, *(1 for _ in self.patch[1:]))
        return _CONVOLVE[len(self.patch) - 1](coordinates, filters, groups=vars(self)["_conv"].groups)

    def reflect(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The coordinates `T U^T p` of all patches in the dtype of `x`, and the chain `U` with columns of length 1.

        `None` if no adapter is active.
        """
        vectors = self.vectors_for(x)
        if vectors is None:
            return None
        chain = householder.normalize(vectors)
        factor = householder.compact_wy(chain)
        return self._coordinates(x, (factor @ chain.to(factor.dtype).mT).to(x.dtype)), chain

    def value_in_graph(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Fake tensors like the result of `reflect`, from fake tensors of the layer's input and output."""
        rank = sum(part.rank() for part in self.chain_parts(self.active or self.specs))
        if not rank:
            return None
        coordinates = x.new_empty((output.shape[0], vars(self)["_conv"].groups * rank, *output.shape[2:]))
        return coordinates, x.new_empty((self.width, rank), dtype=householder.working_dtype(x.dtype))

    def output_of(self, x: Tensor, weight: Tensor, layer: Any) -> Tensor | None:
        """The output of the layer for `x`; `None` if the container must be called."""
        factors = factors_for(self, x)
        if factors is None or factors.rows.dtype is not x.dtype or x.dtype is not weight.dtype:
            return None
        rows, down = factors
        output: Tensor = layer._conv_forward(x, weight, layer.bias)
        return output + self._image(self._coordinates(x, down), weight.flatten(1) @ rows.mT)

    def project(self, read: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        """The correction that the layer subtracts, from the result of `reflect`: `(W U) (T U^T p)` for every patch."""
        coordinates, chain = read
        return self._image(coordinates, (weight.flatten(1).to(chain.dtype) @ chain).to(coordinates.dtype))
