r"""Variants of the forward pass: a layer applies its reflections to the rows of its input, or to the patches.

Both give the result for `W Q`, with `W` reshaped to `(out, d)`, at the cost of two thin matrix products. `W Q` itself
is never computed. A layer with its own forward reads `W Q` (`hra_fx.layers.weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.compat import conv_border
from hra_fx.functional import householder
from hra_fx.kernels.conv import (
    MIN_PATCHES_PER_VECTOR,
    add_up_projection,
    convolve_patches,
    positions,
)
from hra_fx.kernels.dispatch import is_compiling, products_dtype
from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import reflect_rows
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.batching import exported_factors, factors_for, factors_of, uses_factors
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.experts_adapters import ExpertsAdapters
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.quantized import is_foreign_linear, quant_scheme_of
from hra_fx.layers.target import full_shape, is_conv1d, kind_of, width_of

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvGeometry(NamedTuple):
    """The arguments of a convolution, and the padding as `F.pad` takes it, for padding modes other than zeros."""

    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    padding_mode: str
    border: list[int]


def convolve(x: Tensor, filters: Tensor, geometry: ConvGeometry, groups: int) -> Tensor:
    """Apply filters to the patches of a convolution, without a bias."""
    stride, padding, dilation, padding_mode, border = geometry
    if padding_mode != "zeros":
        x, padding = F.pad(x, border, mode=padding_mode), (0,) * len(stride)
    return _CONVOLVE[len(stride)](x, filters, None, stride, padding, dilation, groups)


def patch_coordinates(
    x: Tensor, vectors: Tensor, patch: tuple[int, ...], geometry: ConvGeometry, groups: int
) -> tuple[Tensor, Tensor]:
    """The coordinates of a convolution's patches in the span of the reflection vectors: `T U^T p`.

    `patch` is the shape of a filter of the convolution. The results are the coordinates for every patch and group,
    `(n, groups * k, ...)`, in the dtype of `x`, and the chain: `U` with columns of length 1.
    """
    chain = householder.normalize(vectors)
    factor = householder.compact_wy(chain)
    filters = (factor @ chain.to(factor.dtype).mT).to(x.dtype).reshape(-1, *patch)
    return convolve(x, filters.repeat(groups, *(1 for _ in patch)), geometry, groups), chain


def patch_image(coordinates: Tensor, chain: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The correction that is subtracted from the output of a convolution: `(W U) (T U^T p)` for every patch.

    `coordinates` and `chain` come from `patch_coordinates`.
    """
    mixing = (weight.flatten(1).to(chain.dtype) @ chain).to(coordinates.dtype)
    filters = mixing.reshape(*mixing.shape, *(1 for _ in weight.shape[2:]))
    return _CONVOLVE[weight.dim() - 2](coordinates, filters, groups=groups)


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
        if (exported := exported_factors(self)) is not None:
            return x + (x @ exported.down.to(x.dtype).mT) @ exported.rows.to(x.dtype)
        vectors = self.vectors_for(x)
        if vectors is None:
            return x
        chain = householder.normalize(vectors)
        return householder.reflect(x, chain, householder.compact_wy(chain))


class QuantizedAdapters(LinearAdapters):
    """Reflects the input of a Linear with a quantized weight. Only other readers of the weight need its values."""

    def rotate(self, weight: Tensor) -> Tensor:
        """Compute `W Q` for the quantized weight of the layer."""
        return super().rotate(weight.dequantize())


class ConvAdapters(HouseholderAdapters):
    """Computes the correction of a convolution's output.

    With `W` reshaped to `(out, d)` and a patch `p`, `(W Q) p = W p - (W U) (T U^T p)`. The right parenthesis is a
    convolution with `k` filters, which is computed here. The layer applies the 1x1 convolution `W U` to it (`project`)
    and subtracts the result. Patches are not unfolded, and neither the rotated weight nor the gradient of a weight is
    computed.
    """

    reflects_input = True

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        """Create an empty container for a convolution; only the geometry is stored."""
        super().__init__(width_of(conv), kind_of(conv))
        self.patch = tuple(full_shape(conv.weight)[1:])
        self.groups = conv.groups
        border = conv_border(conv)
        self.geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.padding_mode, border)

    def reflect(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """`patch_coordinates` of `x`; `None` if no adapter is active."""
        vectors = self.vectors_for(x)
        return None if vectors is None else patch_coordinates(x, vectors, self.patch, self.geometry, self.groups)

    def value_in_graph(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Fake tensors like the result of `reflect`, from fake tensors of the layer's input and output."""
        rank = sum(
            tensor.shape[-1] for part in self.chain_parts(self.active or self.specs) for tensor in part.tensors()
        )
        if not rank:
            return None
        coordinates = x.new_empty((output.shape[0], self.groups * rank, *output.shape[2:]))
        return coordinates, x.new_empty((self.width, rank), dtype=householder.working_dtype(x.dtype))

    def output_of(self, x: Tensor, weight: Tensor, layer: Any) -> Tensor | None:
        """The output of the layer for `x`; `None` if the container must be called."""
        factors = factors_for(self, x)
        if factors is None or factors.rows.dtype is not x.dtype or x.dtype is not weight.dtype:
            return None
        if self._has_few_patches(x, factors.rows):
            stride, _, dilation, padding_mode, border = self.geometry
            padded = F.pad(x, border, mode="constant" if padding_mode == "zeros" else padding_mode)
            return convolve_patches(padded, factors, weight, layer.bias, stride, dilation)
        return self._corrected(layer._conv_forward(x, weight, layer.bias), x, factors, weight)

    def _has_few_patches(self, x: Tensor, rows: Tensor) -> bool:
        """Whether products with the patches are cheaper than a correction of the output. On GPUs, this is False.

        These products launch more kernels, and with so few patches, a GPU waits for launches.
        """
        stride, _, dilation, _, border = self.geometry
        if not x.is_cpu or x.dim() != 4 or len(stride) != 2 or self.groups > 1:
            return False
        if is_compiling() or not x.is_contiguous():
            return False
        # `border` starts with the last dimension: left, right, top, bottom.
        borders = zip(x.shape[2:], border[2::-2], border[3::-2], strict=True)
        padded = tuple(length + before + after for length, before, after in borders)
        places = positions(padded, self.patch[1:], stride, dilation)
        return len(x) * places[0] * places[1] <= MIN_PATCHES_PER_VECTOR * len(rows)

    def _corrected(self, output: Tensor, x: Tensor, factors: Factors, weight: Tensor) -> Tensor:
        """Apply the correction to the output of the base layer, possibly in place."""
        kernel, up = factors.down.reshape(-1, *self.patch), torch.mm(factors.rows, weight.flatten(1).mT).mT
        if self.groups > 1:
            kernel = kernel.repeat(self.groups, *(1 for _ in self.patch))
        coordinates = convolve(x, kernel, self.geometry, self.groups)
        dimensions = len(self.patch) - 1
        if self.groups == 1 and output.is_contiguous():
            return add_up_projection(output, up, coordinates, dimensions)
        image = up.reshape(weight.shape[0], -1, *(1 for _ in range(dimensions)))
        return output + _CONVOLVE[dimensions](coordinates, image, groups=self.groups)

    def project(self, read: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        """The correction that the layer subtracts, from the result of `reflect`."""
        return patch_image(*read, weight, self.groups)


def adapters_for(layer: nn.Module) -> HouseholderAdapters:
    """Create an empty container of the right class for a layer that can be adapted."""
    if isinstance(layer, ExpertsWeight):
        return ExpertsAdapters(layer)
    if has_own_forward(layer):
        return HouseholderAdapters(width_of(layer), kind_of(layer), fan_in_fan_out=is_conv1d(layer))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvAdapters(layer)
    form = LinearAdapters if quant_scheme_of(layer) is None else QuantizedAdapters
    return form(width_of(layer), kind_of(layer), fan_in_fan_out=is_conv1d(layer))


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer has its own forward, so that it can only be adapted through its weight.

    This includes attention: its weight contains the projections of q, k and v.
    """
    standard: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if is_foreign_linear(layer):
        return False  # its forward is linear, whatever the class
    if scheme := quant_scheme_of(layer):
        standard = [scheme.cls]
    if is_conv1d(layer):
        standard = [next(cls for cls in type(layer).__mro__ if cls.__name__ == "Conv1D")]
    own: Any = original_class(layer)
    return isinstance(layer, (nn.MultiheadAttention, ExpertsWeight)) or own.forward not in [
        cls.forward for cls in standard
    ]
