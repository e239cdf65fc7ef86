"""State outside of the modules: class attributes and globals that a forward may change while it is traced."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from hra_fx.errors import CaptureError

_CONTAINERS = (dict, list, set, collections.OrderedDict, collections.defaultdict, collections.deque)


@contextlib.contextmanager
def unchanged_surroundings(module: nn.Module) -> Iterator[None]:
    """Raise `CaptureError` if the block changes a class of `module` or below, or a global beside it; all is put back.

    A cache there would keep traced values for ever after; a counter would make every trace another.
    """
    states = [_State(namespace) for namespace in _namespaces(module)]
    try:
        yield
    finally:
        changed = [name for state in states for name in state.restore()]
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
        self._names = {name: value for name, value in vars(owner).items() if not name.startswith("__")}
        self._contents = [(n, value, value.copy()) for n, value in self._names.items() if type(value) in _CONTAINERS]

    def restore(self) -> list[str]:
        """Put back what changed, and name it."""
        changed = [name for name, value, content in self._contents if _put_back(value, content)]
        now = {name: value for name, value in vars(self._owner).items() if not name.startswith("__")}
        for name in self._names.keys() | now.keys():
            if name not in self._names:
                delattr(self._owner, name)
            elif name not in now or now[name] is not self._names[name]:
                setattr(self._owner, name, self._names[name])
            else:
                continue
            changed.append(name)
        return [f"{self._owner.__name__}.{name}" for name in changed]


def _put_back(container: Any, content: Any) -> bool:
    mine, theirs = (list(c.items()) if isinstance(c, dict) else list(c) for c in (container, content))
    same = len(mine) == len(theirs) and all(_identical(a, b) for a, b in zip(mine, theirs, strict=True))
    if not same:
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(content)
    return not same


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2:
        return a[0] is b[0] and a[1] is b[1]
    return a is b
