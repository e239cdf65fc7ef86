"""The classes of adapted layers. A layer applies its own adapters in every call.

A graph that has already computed the reflection passes it as the second argument. All other callers (a method such as
timm's `forward_features`, `nn.Sequential(*model.children())`, a hook, a second parent) pass only the input and get
the same result. Reading `layer.weight` gives `W Q` (`hra_fx.layers.rotated_weight`); the base weight is
`layer.hra_base`.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import AdapterError
from hra_fx.kernels.dispatch import is_plain_eager
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.base_parameters import BaseParameters, tied_again
from hra_fx.layers.quantized import call_quantized
from hra_fx.layers.rotated_values import MOVED
from hra_fx.layers.rotated_weight import InferenceRotatedWeight, RotatedWeight, link
from hra_fx.layers.sharding import call, is_dtensor
from hra_fx.layers.target import BASE_WEIGHT, REFLECTION, weight_place
from hra_fx.layers.tensor_parallel import half_split, is_tensor_parallel, put_back, set_aside
from hra_fx.layers.variants import ConvAdapters, LinearAdapters, QuantizedAdapters


class AdaptedLayer(BaseParameters):
    """An adapted layer. Layers with their own forward use this base class; their forward reads the rotated weight."""

    hra_u: HouseholderAdapters

    @property
    def hra_base(self) -> nn.Parameter:
        """The base weight `W`, without adapters that are not merged."""
        if REFLECTION in self._modules:
            return self.hra_u.weight_of(self)
        owner, name = weight_place(self)
        return owner._parameters[name]  # type: ignore[return-value]

    @property
    def _distribute_module_applied(self) -> bool:
        """torch's mark of a module that `distribute_module` has split, which reads it first and sets it last."""
        applied: bool = vars(self).get("_distribute_module_applied", False)
        if not applied and compat.is_called_by_distribute_module():
            set_aside(self)
        return applied

    @_distribute_module_applied.setter
    def _distribute_module_applied(self, applied: bool) -> None:
        vars(self)["_distribute_module_applied"] = applied
        put_back(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Replace a parameter that is not read as `W Q`. `nn.Module` calls this when an attribute is set."""
        param = tied_again(param)
        if isinstance(param, RotatedWeight):
            raise AdapterError(
                f"{name}: it would be computed from a rotated weight, which itself is computed at each read. Prune or "
                "reparametrize the model before hra_fx.transform, or call hra_fx.fold(model) first."
            )
        if name == BASE_WEIGHT:
            owner, own_name = weight_place(self)
            MOVED.pop(param, None)  # if a copy of W Q is assigned to this name, use its values as they are
            owner._parameters[own_name] = param
            return
        adapters = self._modules.get(REFLECTION)
        if (
            isinstance(adapters, HouseholderAdapters)
            and name == adapters.weight_name
            and adapters.acts
            and self._parameters.get(name) is not None
            and param is not self._parameters[name]
        ):
            raise AdapterError(
                f"{type(self).__name__}.{name} is read as W Q, so it is not clear whether W or W Q is assigned. Assign "
                "the base weight W to `layer.hra_base`, or call hra_fx.fold(model) first."
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load a state. torch reads the parameter by its name, or with `assign=True` replaces it: the base weight."""
        with self.hra_u.inactive() if REFLECTION in self._modules else nullcontext():
            super()._load_from_state_dict(*args)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Add a property that replaces the weight. The parameter itself stays in `_parameters`."""
        name = "in_proj_weight" if issubclass(base, nn.MultiheadAttention) else "weight"

        def weight(self: AdaptedLayer) -> Any:
            if REFLECTION not in self._modules:  # set aside while `distribute_module` splits the weight
                return nn.Module.__getattr__(self, name)
            owner, own = weight_place(self)
            if own not in owner._parameters and own not in vars(owner):
                raise AttributeError(name)
            # FSDP1 reads and stores its parameters here. During a forward, the weight is a plain attribute.
            if getattr(owner._parameters.get(own), "_fsdp_flattened", False):
                return self.hra_base
            try:
                return read_weight(self)
            except AttributeError as error:  # Python would call nn.Module.__getattr__, which returns the base weight
                raise RuntimeError(f"{type(self).__name__}: its weight cannot be rotated ({error})") from error

        def hold(self: AdaptedLayer, value: Any) -> None:
            """Store the weight as a plain attribute, as FSDP1 and DataParallel do during a forward."""
            vars(self)[name] = value

        def drop(self: AdaptedLayer) -> None:
            vars(self).pop(name, None)

        return {name: property(weight, hold, drop)}


def read_weight(
    layer: AdaptedLayer,
    cls: type[RotatedWeight] = RotatedWeight,
    without_gradient: type[RotatedWeight] = InferenceRotatedWeight,
) -> Any:
    """The value of `layer.weight`. `cls` and `without_gradient` are the classes of the rotated weight."""
    base, adapters = layer.hra_base, layer.hra_u
    if torch.compiler.is_compiling() or compat.is_fx_tracing():  # a tracer needs the operations themselves
        return adapters(weight=base)
    if not adapters.acts:
        return base
    if is_dtensor(base):
        # FSDP reads its shards. While a module runs, its parameters are whole, or as tensor parallelism has split them.
        # DTensors do not support other subclasses, so torch functions must compute W Q first.
        if not is_tensor_parallel(layer, base):
            return base
        return link(layer, RotatedWeight) if torch.is_grad_enabled() else RotatedWeight(layer)
    if not is_plain_eager():
        return RotatedWeight(layer)
    return link(layer, cls) if torch.is_grad_enabled() else without_gradient(layer)


class AdaptedLinear(AdaptedLayer):
    """A Linear that reflects its input."""

    hra_u: LinearAdapters
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Call the forward of `base` with `reflected`, or with `x Q^T` if `reflected` is `None`."""

        @functools.wraps(base.forward)
        def forward(self: AdaptedLinear, input: Tensor, reflected: Tensor | None = None) -> Any:
            adapters: Any = self._modules.get(REFLECTION)
            if adapters is None:
                raise half_split(self)
            weight = adapters.weight_of(self)
            if adapters.fan_in_fan_out:  # transformers' `Conv1D`
                weight = weight.mT
            if reflected is None:
                output = adapters.adapted_forward(input, weight, self)
                if output is not None:
                    return output
                reflected = call(adapters, input)
            return F.linear(reflected, weight, self.bias)

        return {**super().wrap(base), "forward": forward}


class AdaptedQuantizedLinear(AdaptedLinear):
    """A quantized Linear that reflects its input. The input always gets a gradient, whatever the library does."""

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Like `AdaptedLinear`, with a straight-through gradient if the library does not pass one."""

        is_torchao = base.forward is nn.Linear.forward

        def run(self: Any, x: Tensor) -> Any:
            return F.linear(x, self.hra_base, self.bias) if is_torchao else base.forward(self, x)

        @functools.wraps(base.forward)
        def forward(self: AdaptedQuantizedLinear, input: Tensor, reflected: Tensor | None = None) -> Any:
            if reflected is None:
                reflected = call(self.hra_u, input)
            return call_quantized(self, reflected, functools.partial(run, self))

        if base.state_dict is not nn.Module.state_dict:
            return {"forward": forward, "state_dict": functools.partialmethod(_whole_state_dict, base)}
        # The forward of bitsandbytes reads its packed weight itself; other code cannot use that weight.
        return {**super().wrap(base), "forward": forward} if is_torchao else {"forward": forward}


def _whole_state_dict(self: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
    """The state of a class with its own `state_dict`, which may leave out children (HQQ), with the adapters."""
    state = base.state_dict(self, *args, **kwargs)
    into, place = kwargs.get("destination"), f"{kwargs.get('prefix', '')}{REFLECTION}."
    self._modules[REFLECTION].state_dict(  # type: ignore[union-attr]
        destination=state if into is None else into, prefix=place, keep_vars=kwargs.get("keep_vars", False)
    )
    return state


class AdaptedConv(AdaptedLayer):
    """A convolution that corrects its output for the reflections."""

    hra_u: ConvAdapters
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Subtract `project(read)` from the forward of `base`. If `read` is `None`, it is computed from the input."""

        @functools.wraps(base.forward)
        def forward(self: Any, input: Tensor, read: tuple[Tensor, Tensor] | None = None) -> Any:
            adapters: Any = self._modules[REFLECTION]
            weight = adapters.weight_of(self)
            if read is None:
                output = adapters.adapted_forward(input, weight, self)
                if output is not None:
                    return output
                read = call(adapters, input)
            output = self._conv_forward(input, weight, self.bias)
            return output if read is None else output - adapters.project(read, weight)

        return {**super().wrap(base), "forward": forward}


def layer_class_for(layer: nn.Module) -> type[AdaptedLayer]:
    """The class to mix into a layer that already has its container of adapters."""
    adapters = layer._modules[REFLECTION]
    if isinstance(adapters, QuantizedAdapters):
        return AdaptedQuantizedLinear
    if isinstance(adapters, ConvAdapters):
        return AdaptedConv
    return AdaptedLinear if isinstance(adapters, LinearAdapters) else AdaptedLayer
