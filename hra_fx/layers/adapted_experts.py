"""The class of a module with adapted 3-D parameters. Reading an adapted parameter gives the rotated experts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer, read_weight
from hra_fx.layers.base_parameters import BaseParameters
from hra_fx.layers.class_swap import swap, unswap
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight
from hra_fx.layers.rotated_experts import RotatedExperts
from hra_fx.layers.target import REFLECTION


class AdaptedExperts(BaseParameters):
    """A module with adapted 3-D parameters. They stay in `_parameters`, and attribute access gives `W_e Q_e`."""

    def __getattr__(self, name: str) -> Any:
        """Return the rotated experts for the name of an adapted parameter, and the module's attribute otherwise."""
        layer = vars(self).get("_modules", {}).get(CHILD + name)
        if not isinstance(layer, AdaptedLayer) or REFLECTION not in layer._modules or name not in self._parameters:
            return super().__getattr__(name)
        try:
            return read_weight(layer, RotatedExperts, RotatedExperts)
        except AttributeError as error:  # Python would treat it as a missing attribute
            raise RuntimeError(f"{type(self).__name__}.{name}: it cannot be rotated ({error})") from error

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Replace a parameter. `nn.Module` calls this when an attribute is set.

        Raises:
            AdapterError: the parameter is read as `W_e Q_e`.
        """
        layer: Any = self._modules.get(CHILD + name)
        if isinstance(layer, AdaptedLayer) and layer.hra_u.acts and param is not self._parameters.get(name):
            raise AdapterError(
                f"{type(self).__name__}.{name} is read as W Q of each expert, so it is not clear whether W or W Q is "
                f"assigned. Assign W to `{CHILD}{name}.hra_base` of the module, or call hra_fx.fold(model) first."
            )
        if name in self._parameters and isinstance(param, nn.Parameter | None):
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load a state. With `assign=True`, torch assigns the base weights by their names."""
        with ExitStack() as block:
            for layer in adapted_parameters(self):
                block.enter_context(layer.hra_u.inactive())
            super()._load_from_state_dict(*args)


def adapted_parameters(owner: nn.Module) -> list[Any]:
    """The layers that represent the adapted parameters of a module."""
    return [child for child in owner._modules.values() if isinstance(child, ExpertsWeight)]


def attach(layer: ExpertsWeight) -> None:
    """Make a layer a child of its owner. The owner then reads its parameter through this layer.

    Raises:
        UnsupportedLayerError: the class of the owner cannot be subclassed.
    """
    swap(layer.owner, AdaptedExperts)
    layer.owner._modules[layer.child] = layer


def detach(layer: ExpertsWeight) -> None:
    """Undo `attach`."""
    layer.owner._modules.pop(layer.child, None)
    if not adapted_parameters(layer.owner):
        unswap(layer.owner, AdaptedExperts)
