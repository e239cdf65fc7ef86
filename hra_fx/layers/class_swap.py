"""Swapping the class of a module object for a subclass of the same name, and back.

The object keeps its identity, attributes, parameters and hooks; `isinstance` stays true; the class prints, pickles and
registers under the name that it had (transformers keys tables by `str(type(model))` and by `__name__`). A module may
wear several carriers, one over the other: the model itself is a region, saves its adapters, and has PEFT's methods.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from hra_fx.errors import UnsupportedLayerError

C = TypeVar("C", bound="Carrier")

_SWAPPED: dict[tuple[type, type], Any] = {}


class Carrier(nn.Module):
    """What all swapped classes have in common: methods that wrap those of the base class, or stand beside them.

    Attributes:
        _hra_height: where it is in a pile. A higher one is over a lower one, whichever came first: that of a whole
            model sees a call before the graph of a region answers it.
    """

    _hra_height: int = 0

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """The methods and properties of the swapped class that stand over those of `base`, by name."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle, deepcopy and `torch.save`: as the base class does, with the class named by its parts."""
        reduced = super().__reduce_ex__(protocol)
        if not is_outermost(self) or not isinstance(reduced, tuple) or reduced[1][:1] != (type(self),):
            return reduced
        make, (_, *arguments), *rest = reduced
        return (_rebuild, (carriers_of(self), original_class(self), make, tuple(arguments)), *rest)


def swapped_class(carrier: type[C], base: type[nn.Module]) -> type[C]:
    """The subclass of `carrier` and `base`, one for each pair."""
    if (carrier, base) not in _SWAPPED:
        _SWAPPED[carrier, base] = _make(carrier, base)
    made: type[C] = _SWAPPED[carrier, base]
    return made


def _make(carrier: type[C], base: type[nn.Module]) -> type[C]:
    names: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_hra_carrier": (carrier, base),
        **carrier.wrap(base),
    }
    made = types.new_class(base.__name__, (carrier, base), exec_body=lambda body: body.update(names))
    made.__qualname__ = base.__qualname__
    return made


def swap(module: nn.Module, carrier: type[Carrier]) -> None:
    """Put a carrier on a module, under those that are higher; the module may be a new object of a class that has it.

    Raises:
        UnsupportedLayerError: its class cannot be subclassed.
    """
    if carrier in carriers_of(module):
        return
    over: list[type[Carrier]] = []
    kind = type(module)
    while "_hra_carrier" in vars(kind) and vars(kind)["_hra_carrier"][0]._hra_height > carrier._hra_height:
        outer, kind = vars(kind)["_hra_carrier"]
        over.insert(0, outer)
    try:
        module.__class__ = _pile([carrier, *over], kind)
    except TypeError as error:
        name = type(module).__name__
        raise UnsupportedLayerError(f"{name}: no subclass can be made of it ({error}). Leave it out.") from error


def unswap(module: nn.Module, carrier: type[Carrier]) -> None:
    """Take one carrier off a module, from wherever in the pile it is; the others stay as they are."""
    worn = [other for other in carriers_of(module) if other is not carrier]
    module.__class__ = _pile(worn, original_class(module))


def carriers_of(module: nn.Module) -> tuple[type[Carrier], ...]:
    """The carriers that a module wears, the innermost first."""
    worn: list[type[Carrier]] = []
    kind = type(module)
    while parts := getattr(kind, "_hra_carrier", None):
        worn.append(parts[0])
        kind = parts[1]
    return tuple(reversed(worn))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its carriers, nor what another tool (FSDP) put over them."""
    return below(type(module))


def below(kind: type[nn.Module]) -> type[nn.Module]:
    """The class under all swapped ones; a class that is not swapped is given back."""
    while parts := getattr(kind, "_hra_carrier", None):
        kind = parts[1]
    return kind


def is_outermost(module: nn.Module) -> bool:
    """Whether a module's class is our swapped one, and not one that another tool made of it."""
    return "_hra_carrier" in vars(type(module))


def _pile(carriers: Iterable[type[Carrier]], base: type[nn.Module]) -> type[nn.Module]:
    return functools.reduce(lambda kind, carrier: swapped_class(carrier, kind), carriers, base)


def _rebuild(
    carriers: tuple[type[Carrier], ...], base: type[nn.Module], make: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    return make(_pile(carriers, base), *arguments)
