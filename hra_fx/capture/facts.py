"""What a graph took for granted about the modules that it dissolved, and whether it still holds.

A traced forward has read attributes, followed children and passed by hooks that a user may change afterwards
(`model.drop_rate = 0.5`, `model.layer4.append(block)`, a hook for Grad-CAM). So each call of a region looks first, at
about a microsecond a module; where anything differs, the Python forward runs, which is always right.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from hra_fx.capture.admission import HOOKS
from hra_fx.carrier.swap import original_class

_MODULE_KEYS = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


class Fact(NamedTuple):
    """The facts of one module: plain data, so that they survive a copy and a pickle."""

    path: str
    type: str
    children: tuple[str, ...]
    absent: tuple[bool, ...]
    attributes: dict[str, Any]


class Watch(NamedTuple):
    """A fact bound to a live module, in the form that is quickest to check."""

    namespace: dict[str, Any]
    children: tuple[nn.Module | None, ...]
    absent: tuple[bool, ...]
    read: Callable[[dict[str, Any]], Any]
    values: Any
    size: int
    dissolved: bool

    def holds(self, training: bool | None) -> bool:
        """Whether the module is as it was: children, presence of parameters, plain attributes.

        For a dissolved one also: no hooks, no new attributes, and the mode `training`, unless that is `None`.
        """
        namespace = self.namespace
        try:
            return (
                self.read(namespace) == self.values
                and tuple(namespace["_modules"].values()) == self.children
                and _absent(namespace["_parameters"]) == self.absent
                and (not self.dissolved or self._is_untouched(training))
            )
        except KeyError:
            return False

    def _is_untouched(self, training: bool | None) -> bool:
        namespace = self.namespace
        in_mode = training is None or namespace["training"] is training
        return in_mode and len(namespace) == self.size and not any(namespace[hooks] for hooks in HOOKS)


def fact(path: str, module: nn.Module, *, opaque: bool) -> Fact:
    """Take down the facts of a module; of an `opaque` one, which is called, not its attributes."""
    attributes = {} if opaque else _attributes(module)
    plain = {key: value for key, value in attributes.items() if not isinstance(value, _FUNCTIONS)}
    kind = original_class(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return Fact(path, name, tuple(module._modules), _absent(module._parameters), plain)


def watch(module: nn.Module, *, opaque: bool, dissolved: bool) -> Watch:
    """Bind to a module as it is now."""
    attributes = {} if opaque else _attributes(module)
    read: Callable[[dict[str, Any]], Any] = operator.itemgetter(*attributes) if attributes else _nothing
    namespace = vars(module)
    absent = _absent(module._parameters)
    children = tuple(module._modules.values())
    return Watch(namespace, children, absent, read, read(attributes), len(namespace), dissolved)


def _nothing(namespace: dict[str, Any]) -> None:
    return None


def _absent(parameters: dict[str, Any]) -> tuple[bool, ...]:
    return tuple(value is None for value in parameters.values())


def _attributes(module: nn.Module) -> dict[str, Any]:
    kept = {key: value for key, value in vars(module).items() if key not in _MODULE_KEYS}
    return {
        key: copy.deepcopy(value) for key, value in kept.items() if _is_plain(value) or isinstance(value, _FUNCTIONS)
    }


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list, set, frozenset):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, _PLAIN)
