"""The carriers of sites: a layer that applies its own reflections, by whatever path it is called.

A region's graph that already read the reflection hands it over as the second argument. Any other caller (a method such
as timm's `forward_features`, `nn.Sequential(*model.children())`, a hook, a second parent) gives the input alone and
gets the same result, so the layer itself is the one place where an adapter cannot be missed. A layer whose weight is
read by others answers them with the rotated one, whoever they are.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph_module import _copy_attr as _COPY

from hra_fx.layers.adapters import Reflection
from hra_fx.layers.class_swap import Carrier
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.layers.quantized.straight_through import straight_through
from hra_fx.layers.target import REFLECTION, kind_of, weight_name
from hra_fx.layers.variants import ConvReflection, LinearReflection, QuantizedReflection, WeightReflection


class SiteCarrier(Carrier):
    """A layer that carries reflections; a new object of its class, which has none, is a plain layer."""

    hra_u: Reflection

    @property
    def hra_base(self) -> nn.Parameter:
        """The weight as it is, without reflections that are not merged."""
        if REFLECTION in self._modules:
            return self.hra_u.weight_of(self)
        plain: nn.Parameter = self._parameters[weight_name(kind_of(self))]  # type: ignore[assignment]
        return plain


class LinearCarrier(SiteCarrier):
    """A Linear over its reflected input."""

    hra_u: LinearReflection
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """`base.forward` at `x Q^T`, where `reflected` is not given; calling no reflections, where that can be."""
        standard = base.forward is nn.Linear.forward

        @functools.wraps(base.forward)
        def forward(self: LinearCarrier, input: Tensor, reflected: Tensor | None = None) -> Any:
            if reflected is None:
                box: Any = self._modules.get(REFLECTION)
                if standard and box is not None:
                    output = box.through(input, self)
                    if output is not None:
                        return output
                reflected = input if box is None else box(input)
            return base.forward(self, reflected)

        return {"forward": forward}


class QuantizedCarrier(LinearCarrier):
    """A quantised Linear over its reflected input: a gradient reaches that whatever the library does with it."""

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """As `LinearCarrier`, straight through the layer where its library passes no gradient."""

        @functools.wraps(base.forward)
        def forward(self: QuantizedCarrier, input: Tensor, reflected: Tensor | None = None) -> Any:
            if reflected is None:
                reflected = self.hra_u(input) if REFLECTION in self._modules else input
            packing = packing_of(self)
            if packing is None:  # another tool has put another weight into it
                return base.forward(self, reflected)
            made = packing.straight_through and torch.is_grad_enabled() and reflected.requires_grad
            with packing.called(self):
                output = base.forward(self, reflected.detach() if made else reflected)
            return straight_through(output, reflected, self, packing) if made else output

        return {"forward": forward}


class ConvCarrier(SiteCarrier):
    """A convolution whose output is corrected by what its reflections read of the input."""

    hra_u: ConvReflection
    weight: Tensor

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """`base.forward` less `project(read)`, where `read` is not given: that of the input."""

        @functools.wraps(base.forward)
        def forward(self: ConvCarrier, input: Tensor, read: tuple[Tensor, Tensor] | None = None) -> Any:
            output = base.forward(self, input)
            if read is None and REFLECTION in self._modules:
                corrected = self.hra_u.corrected(output, input, self.weight)
                if corrected is not None:
                    return corrected
                read = self.hra_u(input)
            return output if read is None else output - self.hra_u.project(read, self.weight)

        return {"forward": forward}


class WeightCarrier(SiteCarrier):
    """A layer whose weight is `W Q` for everyone who reads it: its own forward, or that of another module."""

    hra_u: WeightReflection

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Another parameter in the place of one that is there; torch would ask for the old one, and so for `W Q`."""
        if name in self._parameters and (param is None or isinstance(param, nn.Parameter)):
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """A property in the place of the weight; the parameter itself stays where it is."""

        name = "in_proj_weight" if issubclass(base, nn.MultiheadAttention) else "weight"

        def weight(self: WeightCarrier) -> Any:
            if REFLECTION not in self._modules:  # a new object of this class
                return nn.Module.__getattr__(self, name)
            if _is_asked_for_the_parameter():
                return self.hra_base
            try:
                return self.hra_u(self.hra_base)
            except AttributeError as error:  # which would send Python to nn.Module.__getattr__, and the plain weight
                raise RuntimeError(f"{type(self).__name__}: its weight cannot be reflected ({error})") from error

        def hold(self: WeightCarrier, value: Any) -> None:
            """As a plain attribute: so DataParallel gives its replicas their tensors."""
            vars(self)[name] = value

        return {name: property(weight, hold)}


def _is_asked_for_the_parameter() -> bool:
    """Whether who asks wants the parameter itself, and computes nothing with it.

    So does fx, which copies it into a GraphModule whose graph rotates it by nodes of its own, and torch.distributed,
    which looks for the shards that it put there (FSDP2) or for what to save.
    """
    if torch.compiler.is_compiling():  # first, for a compiler cannot look at frames
        return False
    asking = sys._getframe(2)
    return asking.f_code is _COPY.__code__ or asking.f_globals.get("__name__", "").startswith("torch.distributed.")


def carrier_for(layer: nn.Module) -> type[SiteCarrier]:
    """The carrier for a layer that has its reflections already, by their form."""
    reflection = layer._modules[REFLECTION]
    if isinstance(reflection, WeightReflection):
        return WeightCarrier
    if isinstance(reflection, QuantizedReflection):
        return QuantizedCarrier
    return ConvCarrier if isinstance(reflection, ConvReflection) else LinearCarrier
