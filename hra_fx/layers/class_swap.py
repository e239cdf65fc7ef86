"""Replace the class of a module object with a subclass of the same name, and restore it.

The object keeps its identity, attributes, parameters and hooks, and `isinstance` stays true. The class keeps its name
for printing, pickling and registries (transformers uses `str(type(model))` and `__name__` as keys). A module may have
several mixins: a model that consists of one layer is an adapted layer and an adapted model. Calling the class
(`type(layer)(6, 4)`, `type(model).from_pretrained(...)`) creates an object of the original class.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from hra_fx.errors import UnsupportedLayerError

C = TypeVar("C", bound="SwapMixin")


class SwapMixin(nn.Module):
    """Base class of all mixins. A mixin adds methods to the class of a module, or wraps existing methods.

    Attributes:
        _hra_priority: the order of several mixins on one module. A higher one wraps a lower one.
    """

    _hra_priority: int = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create an object without adapters, which has the original class."""
        # A class that another tool or a user derived from a swapped class creates its own objects. DataParallel creates
        # replicas without arguments.
        if "_hra_mixin" not in vars(cls) or not (args or kwargs):
            return super().__new__(cls)
        return unwrap_class(cls)(*args, **kwargs)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Return the methods and properties that override those of `base`, by name."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Support pickle, deepcopy and `torch.save` like the base class, with the class stored by its parts."""
        reduced = super().__reduce_ex__(protocol)
        if not is_swapped(self) or not isinstance(reduced, tuple) or reduced[1][:1] != (type(self),):
            return reduced
        make, (_, *arguments), *rest = reduced
        return (_rebuild, (mixins_of(self), original_class(self), make, tuple(arguments)), *rest)


def swapped_class(mixin: type[C], base: type[nn.Module]) -> type[C]:
    """The subclass of `mixin` and `base`. There is one for each pair while an object of it exists."""
    # A class has weak references to its subclasses. A registry here would keep the classes of models alive.
    for known in type.__subclasses__(base):
        if vars(known).get("_hra_mixin") == (mixin, base):
            return known  # type: ignore[return-value]
    names = {"__module__": base.__module__, "__doc__": base.__doc__, **mixin.wrap(base)}
    made = types.new_class(base.__name__, (mixin, base), exec_body=lambda body: body.update(names))
    made.__qualname__ = base.__qualname__
    # Do this last: if `__init_subclass__` fails, the class stays among the subclasses of `base` for some time.
    made._hra_mixin = (mixin, base)  # type: ignore[attr-defined]
    return made


def swap(module: nn.Module, mixin: type[SwapMixin]) -> None:
    """Add a mixin to the class of a module, below mixins with a higher priority."""
    mixins = mixins_of(module)
    if mixin in mixins:
        return
    try:
        ordered = sorted([*mixins, mixin], key=lambda each: each._hra_priority)
        set_class(module, _apply_mixins(ordered, original_class(module)))
    except TypeError as error:
        name = type(module).__name__
        raise UnsupportedLayerError(
            f"{name}: its class cannot be subclassed ({error}). Exclude it with exclude_modules."
        ) from error


def unswap(module: nn.Module, mixin: type[SwapMixin]) -> None:
    """Remove one mixin from the class of a module, and keep the others."""
    mixins = [other for other in mixins_of(module) if other is not mixin]
    set_class(module, _apply_mixins(mixins, original_class(module)))


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Set the class of a module. If the module stores a bound `forward`, this becomes the `forward` of `cls`.

    accelerate's hooks call `_old_forward`, which is bound when a hook is added, and they leave a bound `forward` when
    they are removed. Both would bypass the new class.
    """
    before = type(module).forward
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        held = vars(module).get(name)
        if getattr(held, "__self__", None) is module and getattr(held, "__func__", None) is before:
            vars(module)[name] = types.MethodType(cls.forward, module)


def mixins_of(module: nn.Module) -> tuple[type[SwapMixin], ...]:
    """The mixins of a module, from the innermost to the outermost."""
    mixins: list[type[SwapMixin]] = []
    cls = type(module)
    while parts := getattr(cls, "_hra_mixin", None):
        mixins.append(parts[0])
        cls = parts[1]
    return tuple(reversed(mixins))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without mixins, and without a class that another tool (FSDP) added on top of them."""
    return unwrap_class(type(module))


def unwrap_class(cls: type) -> type[nn.Module]:
    """The class below all swapped classes; a class that is not swapped is returned unchanged."""
    while parts := getattr(cls, "_hra_mixin", None):
        cls = parts[1]
    return cls


def is_swapped(module: nn.Module) -> bool:
    """Whether a module's class is a swapped class itself, not a class that another tool derived from it."""
    return "_hra_mixin" in vars(type(module))


def _apply_mixins(mixins: Iterable[type[SwapMixin]], base: type[nn.Module]) -> type[nn.Module]:
    return functools.reduce(lambda cls, mixin: swapped_class(mixin, cls), mixins, base)


def _rebuild(
    mixins: tuple[type[SwapMixin], ...], base: type[nn.Module], make: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    made = make(base, *arguments)
    made.__class__ = _apply_mixins(mixins, base)
    return made
