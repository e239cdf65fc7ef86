"""The carriers of sites: a Linear or Conv2d that applies its own reflections, by whatever path it is called.

A region's graph that already read the reflection hands it over as the second argument. Any other caller (a method such
as timm's `forward_features`, `nn.Sequential(*model.children())`, a hook, a second parent) gives the input alone and
gets the same result, so the layer itself is the one place where an adapter cannot be missed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hra_fx.carrier.swap import Carrier
from hra_fx.reflection import Conv2dReflection, LinearReflection, Reflection
from hra_fx.site import REFLECTION


class SiteCarrier(Carrier):
    """A layer that carries reflections; a new object of its class, which has none, is a plain layer."""

    hra_u: Reflection
    weight: nn.Parameter


class LinearCarrier(SiteCarrier):
    """A Linear over its reflected input."""

    hra_u: LinearReflection

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        """`base.forward` at `x Q^T`, where `reflected` is not given."""

        @functools.wraps(base.forward)
        def forward(self: LinearCarrier, input: Tensor, reflected: Tensor | None = None) -> Any:
            if reflected is None:
                reflected = self.hra_u(input) if REFLECTION in self._modules else input
            return base.forward(self, reflected)

        return {"forward": forward}


class Conv2dCarrier(SiteCarrier):
    """A Conv2d whose output is corrected by what its reflections read of the input."""

    hra_u: Conv2dReflection

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        """`base.forward` less `project(read)`, where `read` is not given: that of the input."""

        @functools.wraps(base.forward)
        def forward(self: Conv2dCarrier, input: Tensor, read: tuple[Tensor, Tensor] | None = None) -> Any:
            if read is None and REFLECTION in self._modules:
                read = self.hra_u(input)
            output = base.forward(self, input)
            return output if read is None else output - self.hra_u.project(read, self.weight)

        return {"forward": forward}


def carrier_for(layer: nn.Module) -> type[SiteCarrier]:
    """The carrier for a kind of layer."""
    return Conv2dCarrier if isinstance(layer, nn.Conv2d) else LinearCarrier
