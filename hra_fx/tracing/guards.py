"""What a graph took for granted about the modules that it dissolved, and whether it still holds.

A traced forward has read attributes, followed children and passed by hooks that a user may change afterwards
(`model.drop_rate = 0.5`, `model.layer4.append(block)`, a hook for Grad-CAM). So each call of a region looks first, at a
few microseconds a module; where anything differs, the Python forward runs, which is always right.
"""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.tracing.admission import HOOKS

_DATA = (bool, int, float, complex, str, bytes, type(None))
#: Values that stay what they are, and are compared by identity or by name.
_FIXED = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodType),
    *(functools.partial, enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, nn.Module),
)


class Fact(NamedTuple):
    """The facts of one module: plain data, so that they survive a copy and a pickle."""

    path: str
    type: str
    children: tuple[str, ...]
    absent: frozenset[str]
    attributes: dict[str, Any]


class Watch(NamedTuple):
    """A fact bound to a live object, in the form that is quickest to check."""

    namespace: dict[str, Any]
    read: Callable[[dict[str, Any]], Any]
    values: Any
    shadows: frozenset[str]
    size: int | None = None

    def holds(self) -> bool:
        """Whether the attributes that were read are what they were, and nothing hides one of the class.

        Of an object whose `size` was taken down, all were read, also those that it did not have.
        """
        try:
            same = bool(self.read(self.namespace) == self.values)
        except (KeyError, RuntimeError, ValueError):  # gone, or compared as tensors and arrays are
            return False
        full = self.size is None or len(self.namespace) == self.size
        return same and full and self.shadows.isdisjoint(self.namespace)


class ModuleWatch(NamedTuple):
    """What is watched of a module beside its attributes."""

    module: nn.Module
    kind: type
    of_class: Callable[[type], Any]
    class_values: Any
    children: tuple[nn.Module | None, ...]
    registered: tuple[tuple[dict[str, Any], str, bool], ...]
    role: str

    def holds(self, training: bool | None) -> bool:
        """Whether class, children and presence of tensors are what they were.

        Below the root also: no hooks and no forward of its own; and for a dissolved one the mode `training`, unless
        that is `None`.
        """
        namespace = vars(self.module)
        return (
            tuple(namespace["_modules"].values()) == self.children
            and all((space.get(name) is None) is absent for space, name, absent in self.registered)
            and self.of_class(self.kind) == self.class_values
            and (self.role in ("root", "asked") or _is_bare(namespace))
            and (self.role != "dissolved" or training is None or namespace["training"] is training)
        )


def _is_bare(namespace: dict[str, Any]) -> bool:
    return not any(namespace[hooks] for hooks in HOOKS) and "forward" not in namespace


def fact(path: str, module: nn.Module, names: frozenset[str]) -> Fact:
    """Take down the facts of a module.

    Args:
        path: its path below the root of the region.
        module: the module.
        names: of the attributes that were read of it.

    Raises:
        CaptureError: one of them is of a kind that may change unseen.
    """
    attributes = {name: _data(f"{path}.{name}".lstrip("."), value) for name, value in _own(module, names).items()}
    kind = original_class(module)
    return Fact(
        path, f"{kind.__module__}.{kind.__qualname__}", tuple(module._modules), _absent(module, names), attributes
    )


def watch(module: nn.Module, names: frozenset[str], role: str) -> tuple[ModuleWatch, list[Watch]]:
    """Bind to a module as it is now, and to the plain objects that it reads.

    Args:
        module: the module.
        names: of the attributes that were read of it.
        role: `"root"`, `"dissolved"`, `"site"`, or `"asked"` for one that is called, and of which something was read.
    """
    own = _own(module, names)
    kind = original_class(module)
    held = (*own, *module._parameters, *module._buffers, *module._modules)
    of_class = sorted(name for name in names if name not in held and hasattr(kind, name))
    ask: Callable[[type], Any] = operator.attrgetter(*of_class) if of_class else _nothing
    children = tuple(module._modules.values())
    spaces = (module._parameters, module._buffers)
    registered = tuple(
        (space, name, value is None) for space in spaces for name, value in space.items() if name in names
    )
    whole = ModuleWatch(module, kind, ask, ask(kind), children, registered, role)
    shadows = names - set(own) - {"forward"}
    spaces_read = (vars(value) for value in own.values() if _is_object(value))
    objects = (_watch(space, space, frozenset(), len(space)) for space in spaces_read)
    return whole, [_watch(vars(module), own, shadows), *objects]


def _watch(
    namespace: dict[str, Any], attributes: dict[str, Any], shadows: frozenset[str], size: int | None = None
) -> Watch:
    read: Callable[[dict[str, Any]], Any] = operator.itemgetter(*attributes) if attributes else _nothing
    frozen = {name: _frozen(value) for name, value in attributes.items()}
    return Watch(namespace, read, read(frozen), shadows, size)


def _own(module: nn.Module, names: frozenset[str]) -> dict[str, Any]:
    namespace = vars(module)
    return {name: namespace[name] for name in sorted(names) if name in namespace}


def _nothing(anything: Any) -> None:
    return None


def _absent(module: nn.Module, names: frozenset[str]) -> frozenset[str]:
    """Parameters, buffers and children among `names` that are registered as `None`."""
    registered = (module._parameters, module._buffers, module._modules)
    return frozenset(
        name for tensors in registered for name, value in tensors.items() if value is None and name in names
    )


def _called(value: Any) -> str:
    """What a function, a class or a dtype is called: by its name, and a function by its line too."""
    if isinstance(value, functools.partial):
        return f"partial {_called(value.func)} {value.args} {value.keywords}"
    line = getattr(getattr(value, "__code__", None), "co_firstlineno", "")
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '')}.{name} {line}" if name else repr(value)


def _data(name: str, value: Any, *, inside: bool = False) -> Any:
    """A value as plain data, for comparison with that of a copy.

    What an object `inside` of a container becomes is not watched, so there may be none there.
    """
    if isinstance(value, _DATA):
        return value
    if isinstance(value, nn.Module):
        return None
    if isinstance(value, types.MethodType) and not isinstance(value.__self__, (nn.Module, type)):
        raise CaptureError(f"its forward reads {name}, a method of an object, which may change unseen")
    if isinstance(value, _FIXED):
        return _called(value)
    if isinstance(value, dict):
        return {
            _data(name, key, inside=True): _data(f"{name}[{key!r}]", item, inside=True) for key, item in value.items()
        }
    if isinstance(value, (list, tuple, collections.deque)):
        return [_data(f"{name}[{place}]", item, inside=True) for place, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return {_data(name, item, inside=True) for item in value}
    if _is_object(value) and not inside:
        held = dict(vars(value))
        if not any(_is_object(item) for item in held.values()):
            return {key: _data(f"{name}.{key}", item) for key, item in held.items()}
    raise CaptureError(f"its forward reads {name}, a {type(value).__name__}, which may change unseen")


def _is_object(value: Any) -> bool:
    known = isinstance(value, (*_DATA, *_FIXED, Tensor, dict, list, tuple, set, frozenset, collections.deque))
    return not known and isinstance(getattr(value, "__dict__", None), dict)


def _frozen(value: Any) -> Any:
    """The same containers anew, so that a later change of the originals shows."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, collections.deque):
        return collections.deque(_frozen(item) for item in value)
    if isinstance(value, list):
        return [_frozen(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_frozen(item) for item in value)
    return set(value) if isinstance(value, set) else value
