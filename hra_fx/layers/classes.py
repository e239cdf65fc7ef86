"""Which container and which class an adapted layer gets."""

from __future__ import annotations

from typing import Any

from torch import nn

from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import original_class, swap, unswap
from hra_fx.layers.conv import AdaptedConv, ConvAdapters
from hra_fx.layers.experts import ExpertsAdapters, attach, detach
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.linear import AdaptedLinear, LinearAdapters
from hra_fx.layers.quantized.adapted import AdaptedQuantizedLinear, QuantizedAdapters
from hra_fx.layers.quantized.libraries import quant_scheme_of
from hra_fx.layers.target import REFLECTION, is_conv1d, kind_of, width_of


def adapters_for(layer: nn.Module) -> HouseholderAdapters:
    """Create an empty container of the right class for a layer that can be adapted."""
    if isinstance(layer, ExpertsWeight):
        return ExpertsAdapters(layer)
    if _has_own_forward(layer):
        return HouseholderAdapters(width_of(layer), kind_of(layer), fan_in_fan_out=is_conv1d(layer))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvAdapters(width_of(layer), kind_of(layer))
    form = LinearAdapters if quant_scheme_of(layer) is None else QuantizedAdapters
    return form(width_of(layer), kind_of(layer), fan_in_fan_out=is_conv1d(layer))


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer has its own forward, so that it can only be adapted through its weight.

    This includes attention: its weight contains the projections of q, k and v.
    """
    if quant_scheme_of(layer) is not None:
        return False  # its forward is linear, whatever the class
    standard: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if is_conv1d(layer):
        standard = [next(cls for cls in type(layer).__mro__ if cls.__name__ == "Conv1D")]
    own: Any = original_class(layer)
    if isinstance(layer, (nn.MultiheadAttention, ExpertsWeight)) or own.forward not in [
        cls.forward for cls in standard
    ]:
        return True
    # A convolution that, for example, standardizes its weight there reads `layer.weight`.
    convolve = getattr(own, "_conv_forward", None)
    return convolve not in [None, *[cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]]


def layer_class_for(layer: nn.Module) -> type[AdaptedLayer]:
    """The class to mix into a layer that already has its container of adapters."""
    adapters = layer._modules[REFLECTION]
    if isinstance(adapters, QuantizedAdapters):
        return AdaptedQuantizedLinear
    if isinstance(adapters, ConvAdapters):
        return AdaptedConv
    return AdaptedLinear if isinstance(adapters, LinearAdapters) else AdaptedLayer


def adapt_layer(path: str, layer: nn.Module) -> None:
    """Make a layer an adapted layer without adapters."""
    adapters = adapters_for(layer)
    adapters.layer_path = path
    adapters.train(layer.training)
    layer.add_module(REFLECTION, adapters)
    try:
        swap(layer, layer_class_for(layer))
        if isinstance(layer, ExpertsWeight):
            attach(layer)
    except UnsupportedLayerError as error:
        del layer._modules[REFLECTION]
        raise UnsupportedLayerError(f"{path}: {error}") from error


def make_plain(layer: nn.Module) -> None:
    """Undo `adapt_layer`."""
    unswap(layer, layer_class_for(layer))
    del layer._modules[REFLECTION]
    if isinstance(layer, ExpertsWeight):
        detach(layer)
