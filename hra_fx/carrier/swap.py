"""Swapping the class of a module object for a subclass of the same name, and back.

The object keeps its identity, attributes, parameters and hooks; `isinstance` stays true; the class prints, pickles and
registers under the name that it had (transformers keys tables by `str(type(model))` and by `__name__`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

C = TypeVar("C", bound="Carrier")

_SWAPPED: dict[tuple[type, type], Any] = {}


class Carrier(nn.Module):
    """What all swapped classes have in common. Subclasses give the forward that wraps the one of the base class."""

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> Callable[..., Any]:
        """The forward of the swapped class over `base`."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle, deepcopy and `torch.save`: as the base class does, with the class named by its parts."""
        reduced = super().__reduce_ex__(protocol)
        if not is_outermost(self) or not isinstance(reduced, tuple) or reduced[1][:1] != (type(self),):
            return reduced
        make, (_, *arguments), *rest = reduced
        return (_rebuild, (carrier_of(self), original_class(self), make, tuple(arguments)), *rest)


def swapped_class(carrier: type[C], base: type[nn.Module]) -> type[C]:
    """The subclass of `carrier` and `base`, one for each pair."""
    if (carrier, base) not in _SWAPPED:
        _SWAPPED[carrier, base] = _make(carrier, base)
    made: type[C] = _SWAPPED[carrier, base]
    return made


def _make(carrier: type[C], base: type[nn.Module]) -> type[C]:
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": carrier.wrap(base),
        "_hra_carrier": (carrier, base),
    }
    made = types.new_class(base.__name__, (carrier, base), exec_body=lambda body: body.update(names))
    made.__qualname__ = base.__qualname__
    return made


def swap(module: nn.Module, carrier: type[Carrier]) -> None:
    """Put a carrier on a module."""
    module.__class__ = swapped_class(carrier, type(module))


def unswap(module: nn.Module) -> None:
    """Give a module back the class that it had."""
    module.__class__ = original_class(module)


def carrier_of(module: nn.Module) -> type[Carrier] | None:
    """The carrier that a module wears, if any."""
    parts = vars(type(module)).get("_hra_carrier")
    return parts[0] if parts else None


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its carrier, nor what another tool (FSDP) put over it."""
    return below(type(module))


def below(kind: type[nn.Module]) -> type[nn.Module]:
    """The class under a swapped one; a class that is not swapped is given back."""
    base: type[nn.Module] = getattr(kind, "_hra_carrier", (None, kind))[1]
    return base


def is_outermost(module: nn.Module) -> bool:
    """Whether a module's class is our swapped one, and not one that another tool made of it."""
    return "_hra_carrier" in vars(type(module))


def _rebuild(
    carrier: type[Carrier], base: type[nn.Module], make: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    return make(swapped_class(carrier, base), *arguments)
