"""Layers of HQQ, which is not imported here: if it is not loaded, no object has its classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.quantized.scheme import QuantScheme, Requantized


class HQQ(QuantScheme):
    """`HQQLinear`: packed codes in `W_q`; the scales and zeros are in the dictionary `meta`.

    hra_fx computes the gradient of the input, because HQQ's own backward fails under autocast, and only its default
    backend has one.
    """

    straight_through = True

    def description(self, layer: Any) -> str:
        """The library and the number of bits."""
        return f"HQQ, {layer.meta['nbits']} bit"

    def why_not_requantized(self, layer: Any) -> str | None:
        """Files of early releases do not have the settings."""
        return None if layer.quant_config else "it was loaded without its quant_config"

    def values(self, layer: Any) -> Tensor:
        """Use the library's function, in the layer's compute dtype."""
        values: Tensor = layer.dequantize()
        return values.detach()

    def requantized(self, layer: Any, rows: Tensor) -> Requantized:
        """Quantize with the same settings, from float32."""
        settings = layer.quant_config | {"offload_meta": layer.offload_meta}
        made: Any = original_class(layer)
        with torch.no_grad():
            fresh = made.from_weights(
                rows.float(), None, settings, compute_dtype=layer.compute_dtype, device=layer.device
            )
        fresh.W_q.meta = fresh.meta  # for `put`, which needs the scales too
        return Requantized(fresh.W_q, self.values(fresh))

    def put(self, layer: Any, weight: nn.Parameter) -> None:
        """Set the codes and their scales."""
        held: Any = weight
        layer._parameters["W_q"], layer.meta = weight, held.meta
        del held.meta
