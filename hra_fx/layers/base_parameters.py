"""Modules that keep the base weight `W` where other code reads a rotated weight, and stores or ties what it has read.

accelerate moves a parameter that it reads as an attribute, and writes the result into `_parameters`. It ties modules
again by assigning the weight of one to the others.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from torch import nn

from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.layers.rotated_values import RotatedValues, become_base
from hra_fx.layers.rotated_weight import TIED, RotatedWeight
from hra_fx.layers.target import weight_place


class BaseParameters(SwapMixin):
    """A module whose parameters are base weights, whatever other code stores of `layer.weight`."""

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        held: dict[str, Any] = vars(self)["_parameters"]
        for name, value in held.items():
            if type(value) is RotatedValues:
                held[name] = become_base(value)
        return held

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        vars(self)["_parameters"] = parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module; a rotated weight that is tied again stands for the parameter."""
        super().register_parameter(name, tied_again(param))


def tied_again(param: Any) -> Any:
    """The base weight in place of a tied rotated weight; any other value is returned."""
    return param.base() if isinstance(param, RotatedWeight) and param._is_param else param


def swap_tied_modules(model: nn.Module, layers: Collection[nn.Module], undo: ExitStack) -> None:
    """Let all modules of a model that share a weight with adapted layers keep the base weight too."""
    places = {layer: weight_place(layer) for layer in layers}
    weights = {id(owner._parameters.get(name)): layer for layer, (owner, name) in places.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            layer = None if parameter is None else weights.get(id(parameter))
            if layer is None or (module, name) == places[layer]:
                continue
            vars(layer)[TIED] = True
            undo.callback(vars(layer).pop, TIED, None)
            if not isinstance(module, BaseParameters):
                swap(module, BaseParameters)
                undo.callback(unswap, module, BaseParameters)
