"""Modules that keep the base weight `W`, even if other code reads a rotated weight and stores or ties the result.

accelerate reads a parameter as an attribute, moves it, and writes the result into `_parameters`. It ties modules again
by assigning the weight of one module to the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.layers.rotated_values import MOVED, Moved, moved_base
from hra_fx.layers.rotated_weight import TIED, RotatedWeight
from hra_fx.layers.target import weight_place


class BaseParameters(SwapMixin):
    """A module with base weights as parameters, even if other code stores values of `layer.weight`."""

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        held: dict[str, Any] = vars(self)["_parameters"]
        if not torch.compiler.is_dynamo_compiling() and MOVED.data:
            for name, value in held.items():
                origin: Any = None if value is None else MOVED.get(value)
                layer = None if origin is None else origin.layer()
                if layer is None:
                    continue
                owner, own = weight_place(layer)
                if (theirs := vars(owner)["_parameters"]).get(own) is value:  # a tied module may be asked first
                    theirs[own] = held[name] = _become_base(value, origin)
        return held

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        vars(self)["_parameters"] = parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like `nn.Module.register_parameter`, but a rotated weight that is tied again means the parameter itself."""
        param = tied_again(param)
        if name in self._parameters and isinstance(param, nn.Parameter | None):
            self._parameters[name] = param  # without reading the attribute, which computes a weight
        else:
            super().register_parameter(name, param)


class TiedModule(BaseParameters):
    """A module that shares its weight with an adapted layer, and reads it as an attribute."""

    def __getattr__(self, name: str) -> Any:
        """Like `nn.Module.__getattr__`, which reads the dictionary directly instead of the property."""
        if name in vars(self).get("_parameters", ()):
            return self._parameters[name]
        return super().__getattr__(name)


def _become_base(parameter: nn.Parameter, origin: Moved) -> Any:
    """Replace values of `W Q` with the base weight, in the same object unless the base weight is quantized."""
    base = moved_base(origin)
    if type(base) is not Tensor:
        return base
    parameter.data = base
    del MOVED[parameter]
    return parameter


def tied_again(param: Any) -> Any:
    """Return the base weight for a rotated weight that is tied, and any other value unchanged."""
    return param.base() if isinstance(param, RotatedWeight) and param._is_param else param


def swap_tied_modules(modules: Iterable[nn.Module], layers: Collection[nn.Module], undo: ExitStack) -> None:
    """Make all modules that share a weight with adapted layers keep the base weight too."""
    places = {layer: weight_place(layer) for layer in layers}
    weights = {id(owner._parameters.get(name)): layer for layer, (owner, name) in places.items()}
    for module in modules:
        for name, parameter in module._parameters.items():
            layer = None if parameter is None else weights.get(id(parameter))
            if layer is None or (module, name) == places[layer]:
                continue
            vars(layer)[TIED] = True
            undo.callback(vars(layer).pop, TIED, None)
            if not isinstance(module, BaseParameters):
                swap(module, TiedModule)
                undo.callback(unswap, module, TiedModule)
