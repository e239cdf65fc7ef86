"""How the weight of a layer is quantised, if it is."""

from __future__ import annotations

from torch import nn

from hra_fx.layers.quantized.bitsandbytes_layers import bitsandbytes_packing
from hra_fx.layers.quantized.scheme import QuantScheme
from hra_fx.layers.quantized.torchao_weights import torchao_packing


def quant_scheme_of(layer: nn.Module) -> QuantScheme | None:
    """The packing of a quantised Linear; `None` for any other layer, of a library that is not known here too.

    Example:
        >>> quant_scheme_of(nn.Linear(6, 4)) is None
        True
    """
    return bitsandbytes_packing(layer) or torchao_packing(layer)
