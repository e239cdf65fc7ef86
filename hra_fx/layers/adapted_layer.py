"""The classes of adapted layers: how a layer computes its output.

A layer applies its own adapters in every call. A graph that has already computed the reflection passes it as the second
argument, and the layer only multiplies. All other callers (a method such as timm's `forward_features`,
`nn.Sequential(*model.children())`, a hook, a second parent) pass only the input and get the same result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from hra_fx import compat
from hra_fx.errors import UnsupportedLayerError
from hra_fx.kernels.linear import linear
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.batching import factors_for
from hra_fx.layers.class_swap import SwapMixin
from hra_fx.layers.running import RUNNING
from hra_fx.layers.sharding import SPLIT, call, is_dtensor
from hra_fx.layers.target import REFLECTION, weight_name
from hra_fx.layers.variants import ConvAdapters, LinearAdapters
from hra_fx.layers.weight import running, weight_property


class AdaptedLayer(SwapMixin):
    """An adapted layer. Layers with their own forward use this base class; their forward reads `W Q`."""

    hra_u: HouseholderAdapters

    @property
    def hra_base(self) -> nn.Parameter:
        """The parameter `W` at any time, also while `layer.weight` is `W Q`. It includes merged adapters."""
        return self.hra_u.weight_of(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like `nn.Module.register_parameter`. `parallelize_module` calls it with a split weight, which is refused."""
        if is_dtensor(param) and not is_dtensor(self._parameters.get(name)):
            raise UnsupportedLayerError(f"{self.hra_u.layer_path}: {SPLIT}.")
        super().register_parameter(name, param)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Add the property `weight`, and run a forward that reads it."""
        name = weight_name("attention" if issubclass(base, nn.MultiheadAttention) else "linear")
        return {name: weight_property(name), "forward": running(base.forward)}


class AdaptedLinear(AdaptedLayer):
    """A Linear that reflects its input."""

    hra_u: LinearAdapters
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Call the forward of `base` with `reflected`, or with `x Q^T` if `reflected` is `None`."""

        @functools.wraps(base.forward)
        def forward(self: Any, input: Tensor, reflected: Tensor | None = None) -> Any:
            adapters: Any = self._modules[REFLECTION]
            own = self._parameters
            weight = own["weight"] if "weight" in own else adapters.weight_of(self)
            bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401  # `get` would always read self.bias
            if adapters.fan_in_fan_out:  # transformers' `Conv1D`
                weight = weight.mT
            if reflected is not None:
                return F.linear(reflected, weight, bias)
            run = None if is_dynamo_compiling() else RUNNING.run
            if run is not None and (prepared := run.factors.get(adapters)) is not None:
                factors, active, has_graph = prepared
                # The usual case of `factors_for` and `linear`, here because a call takes as long as a small operator.
                if (
                    factors.rows.dtype is input.dtype
                    and active is adapters.active
                    and has_graph is torch.is_grad_enabled()
                    and (input.requires_grad or not has_graph)
                    and type(input) is Tensor
                    and not compat.is_autocast_active()
                    and not compat.is_dispatch_mode_active()
                ):
                    rows, down = factors
                    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
                    output = F.linear(torch.addmm(flat, F.linear(flat, down), rows), weight, bias)
                    return output if flat is input else output.view(*input.shape[:-1], weight.shape[0])
            factors = factors_for(adapters, input)
            if factors is None:
                return F.linear(call(adapters, input), weight, bias)
            return linear(input, factors, weight, bias)

        return {**super().wrap(base), "forward": forward}


class AdaptedConv(AdaptedLayer):
    """A convolution that corrects its output for the reflections."""

    hra_u: ConvAdapters
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Subtract `project(reflected)` from the forward of `base`. If it is `None`, it is computed from the input."""

        @functools.wraps(base.forward)
        def forward(self: Any, input: Tensor, reflected: tuple[Tensor, Tensor] | None = None) -> Any:
            adapters: Any = self._modules[REFLECTION]
            weight = adapters.weight_of(self)
            if reflected is None:
                output = adapters.output_of(input, weight, self)
                if output is not None:
                    return output
                reflected = call(adapters, input)
            output = self._conv_forward(input, weight, self.bias)
            return output if reflected is None else output - adapters.project(reflected, weight)

        return {**super().wrap(base), "forward": forward}
