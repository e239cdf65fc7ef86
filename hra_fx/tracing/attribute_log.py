"""Which attributes of its modules a forward reads: those, and no others, are what a graph takes for granted."""

from __future__ import annotations

import collections
import types
from typing import Any

from torch import nn

#: Attributes that every module has.
OF_TORCH = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module()))


class ReadingLog:
    """Reads of attributes, module by module, of the modules that it was put on.

    Attributes that every `nn.Module` has are left out, `forward` excepted.

    Attributes:
        writes: names of attributes that were set, also where the old value was set again later.
    """

    def __init__(self) -> None:
        """An empty log."""
        self._reads: dict[int, set[str]] = collections.defaultdict(set)
        self._classes: dict[type, type] = {}
        self.writes: list[str] = []

    def put_on(self, module: nn.Module) -> None:
        """Watch one module from now on, by a subclass of its own class; only for modules that are thrown away after."""
        base = type(module)
        if base not in self._classes:
            self._classes[base] = self._logging(base)
        module.__class__ = self._classes[base]

    def _logging(self, base: type[nn.Module]) -> type:
        reads, writes, read, write = self._reads, self.writes, base.__getattribute__, base.__setattr__

        def __getattribute__(self: nn.Module, name: str) -> Any:
            if name not in OF_TORCH:
                reads[id(self)].add(name)
            return read(self, name)

        def __setattr__(self: nn.Module, name: str, value: Any) -> None:
            writes.append(name)
            write(self, name, value)

        names = {
            "__setattr__": __setattr__,
            "__module__": base.__module__,
            "__getattribute__": __getattribute__,
            "forward": base.forward,
            "_hra_carrier": (None, base),
        }
        kind: Any = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(names))
        kind.__qualname__ = base.__qualname__
        return kind  # type: ignore[no-any-return]

    def reads(self, module: nn.Module) -> frozenset[str]:
        """Names that were read of a module."""
        return frozenset(self._reads.get(id(module), ())) | {"forward"}
