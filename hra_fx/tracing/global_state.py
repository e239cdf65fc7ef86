"""State outside of the modules: class attributes and globals that a forward may change while it is traced."""

from __future__ import annotations

import collections
import contextlib
import operator
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hra_fx.errors import CaptureError

#: Packages whose objects are not the model's, or guard themselves.
_NOT_THE_MODELS = ("torch", "builtins", "typing", "logging", "functools", "collections", "re", "enum", "numpy", "abc")
_CONTAINERS = (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)


class Surroundings:
    """The classes of a module and of those below it, and the Python modules beside these, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        """Take down the surroundings of `module`."""
        self._states = [_State(namespace) for namespace in _namespaces(module)]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise `CaptureError` if the block changes them; all is put back.

        A cache there would keep traced values for ever after; a counter would make every trace another.
        """
        try:
            yield
        finally:
            changed = [name for state in self._states for name in state.restore()]
        if changed:
            raise CaptureError(f"its forward changes {', '.join(changed[:3])}, which is global")


def _namespaces(module: nn.Module) -> Iterator[Any]:
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    own = {kind for kind in classes if kind.__module__.split(".")[0] not in ("torch", "builtins", "abc")}
    yield from own
    yield from {id(home): home for kind in own if (home := sys.modules.get(kind.__module__))}.values()


class _State:
    """The names of one class or Python module, and the contents of its containers."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._names = dict(vars(owner))
        plain = {name: value for name, value in self._names.items() if not name.startswith("__")}
        held = {f"{name}.{key}": item for name, value in plain.items() for key, item in _of_object(value).items()}
        self._contents = [
            (name, value, value.copy()) for name, value in {**plain, **held}.items() if type(value) in _CONTAINERS
        ]
        self._contents += [(name, space, dict(space)) for name, value in plain.items() if (space := _of_object(value))]
        self._random = [(name, value, _state(value)) for name, value in plain.items() if _state(value) is not None]

    def restore(self) -> list[str]:
        """Put back what changed, and name it."""
        changed = [name for name, value, content in self._contents if _put_back(value, content)]
        changed += [name for name, generator, state in self._random if not _is_same_state(_state(generator), state)]
        if not _are_identical(vars(self._owner), self._names):
            changed += self._restore_names()
        return [f"{self._owner.__name__}.{name}" for name in changed]

    def _restore_names(self) -> list[str]:
        changed: list[str] = []
        now = dict(vars(self._owner))
        for name in self._names.keys() | now.keys():
            if name.startswith("__"):
                continue
            if name not in self._names:
                delattr(self._owner, name)
            elif name not in now or _without_fx(now[name]) is not self._names[name]:
                setattr(self._owner, name, self._names[name])
            else:
                continue
            changed.append(name)
        return changed


def _without_fx(value: Any) -> Any:
    """What fx has put a function of its own in place of, as it does while it traces; else the value itself."""
    while isinstance(value, types.FunctionType) and value.__globals__ is vars(torch.fx._symbolic_trace):
        value = getattr(value, "__wrapped__", None)
    return value


def _of_object(value: Any) -> dict[str, Any]:
    """The attributes of a plain object of the model's own packages, such as a counter or a tracker of losses."""
    home = type(value).__module__.split(".")[0]
    plain = not isinstance(value, (type, types.ModuleType, types.FunctionType, nn.Module))
    space = getattr(value, "__dict__", None) if plain and home not in _NOT_THE_MODELS else None
    return space if type(space) is dict else {}


def _state(value: Any) -> Any:
    """Where a random generator is; `None` for what is none."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    numpy = sys.modules.get("numpy")
    return value.bit_generator.state if numpy and isinstance(value, numpy.random.Generator) else None


def _is_same_state(now: Any, then: Any) -> bool:
    return torch.equal(now, then) if isinstance(now, torch.Tensor) else str(now) == str(then)


def _put_back(container: Any, content: Any) -> bool:
    if _are_identical(container, content):
        return False
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(content)
    return True


def _are_identical(now: Any, then: Any) -> bool:
    """Whether two containers hold the same objects, and, but for sets, in the same order."""
    if len(now) != len(then):
        return False
    if isinstance(now, set):
        return {*map(id, now)} == {*map(id, then)}
    if not all(map(operator.is_, now, then)):
        return False
    return isinstance(now, (list, collections.deque)) or all(map(operator.is_, now.values(), then.values()))
