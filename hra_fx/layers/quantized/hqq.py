"""Layers of HQQ, which is not imported here: if it is not loaded, no object has its classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hra_fx.layers.quantized.scheme import QuantScheme


class HQQ(QuantScheme):
    """`HQQLinear`: packed codes in `W_q`; the scales and zeros are in the dictionary `meta`.

    hra_fx computes the gradient of the input, because HQQ's own backward fails under autocast, and only its default
    backend has one.
    """

    straight_through = True

    def description(self, layer: Any) -> str:
        """The library and the number of bits."""
        return f"HQQ, {layer.meta['nbits']} bit"

    def values(self, layer: Any) -> Tensor:
        """Use the library's function, in the layer's compute dtype."""
        values: Tensor = layer.dequantize()
        return values.detach()
