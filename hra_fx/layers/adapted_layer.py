"""The base class of adapted layers.

A layer applies its own adapters in every call. In a graph, a node before the layer computes the reflection, and the
argument `reflected` tells the layer to only multiply. All other callers (a method such as timm's `forward_features`,
`nn.Sequential(*model.children())`, a hook, a second parent) pass only the input and get the same result.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import SwapMixin
from hra_fx.layers.running import RUNNING
from hra_fx.layers.sharding import SPLIT, is_dtensor
from hra_fx.layers.target import weight_name
from hra_fx.layers.weight import running, weight_property


class AdaptedLayer(SwapMixin):
    """An adapted layer. Layers with their own forward use this base class; their forward reads `W Q`."""

    hra_u: HouseholderAdapters

    @property
    def hra_base(self) -> nn.Parameter:
        """The parameter `W` at any time, also while `layer.weight` is `W Q`. It includes merged adapters."""
        return self.hra_u.weight_of(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like `nn.Module.register_parameter`, but refuse a split weight, and a new weight while the model runs.

        `parallelize_module` splits weights. A forward that computes a new weight reads `W Q`, so it would rotate twice.
        """
        if is_dtensor(param) and not is_dtensor(self._parameters.get(name)):
            raise UnsupportedLayerError(f"{self.hra_u.layer_path}: {SPLIT}.")
        # FSDP1 restores its own parameters after the forward of a block.
        is_new = RUNNING.run is not None and not getattr(param, "_fsdp_flattened", False)
        if name == self.hra_u.weight_name and is_new:
            raise AdapterError(
                f"{self.hra_u.layer_path}: the forward of the model sets its {name}, which is W Q then. Leave the "
                "layer out with exclude_modules, or set the weight outside of the forward."
            )
        super().register_parameter(name, param)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Add the property `weight`, and run a forward that reads it."""
        name = weight_name("attention" if issubclass(base, nn.MultiheadAttention) else "linear")
        return {name: weight_property(name), "forward": running(base.forward)}
