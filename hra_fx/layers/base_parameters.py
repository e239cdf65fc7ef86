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
from hra_fx.layers.rotated_weight import RotatedWeight
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

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module; a rotated weight stands for the parameter."""
        super().__setattr__(name, value.base() if isinstance(value, RotatedWeight) else value)


def swap_tied_modules(model: nn.Module, layers: Collection[nn.Module], undo: ExitStack) -> None:
    """Let all modules of a model that share a weight with adapted layers keep the base weight too."""
    places = [weight_place(layer) for layer in layers]
    weights = {id(owner._parameters.get(name)) for owner, name in places} - {id(None)}
    for module in model.modules():
        if not isinstance(module, BaseParameters) and not weights.isdisjoint(map(id, module._parameters.values())):
            swap(module, BaseParameters)
            undo.callback(unswap, module, BaseParameters)
