"""Detect the quantization scheme of a layer."""

from __future__ import annotations

from torch import nn

from hra_fx.layers.quantized.bitsandbytes_layers import bitsandbytes_scheme
from hra_fx.layers.quantized.scheme import QuantScheme
from hra_fx.layers.quantized.torchao_weights import torchao_scheme


def quant_scheme_of(layer: nn.Module) -> QuantScheme | None:
    """The scheme of a quantized Linear; `None` for other layers, and for libraries that hra_fx does not support.

    Example:
        >>> quant_scheme_of(nn.Linear(6, 4)) is None
        True
    """
    return bitsandbytes_scheme(layer) or torchao_scheme(layer)
