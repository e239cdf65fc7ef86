"""How the weight of a layer is quantised, if it is."""

from __future__ import annotations

from torch import nn

from hra_fx.layers.quantized.bitsandbytes_layers import bitsandbytes_packing
from hra_fx.layers.quantized.scheme import Packing
from hra_fx.layers.quantized.torchao_weights import torchao_packing


def packing_of(layer: nn.Module) -> Packing | None:
    """The packing of a quantised Linear; `None` for any other layer, of a library that is not known here too.

    Example:
        >>> packing_of(nn.Linear(6, 4)) is None
        True
    """
    return bitsandbytes_packing(layer) or torchao_packing(layer)
