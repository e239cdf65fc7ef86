"""Which attributes of its modules a forward reads: those, and no others, are what a graph takes for granted."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

_OF_TORCH = frozenset(dir(nn.Module)) | frozenset(vars(nn.Module()))


class ReadingLog:
    """Reads of attributes, module by module, of the modules that it was put on.

    Attributes that every `nn.Module` has are left out, `forward` excepted.
    """

    def __init__(self) -> None:
        """An empty log."""
        self._reads: dict[int, set[str]] = {}

    def put_on(self, module: nn.Module) -> None:
        """Watch one module from now on, by a subclass of its own class; only for modules that are thrown away after."""
        base = type(module)
        reads = self._reads.setdefault(id(module), set())

        def __getattribute__(self: nn.Module, name: str) -> Any:
            reads.add(name)
            return base.__getattribute__(self, name)

        names = {
            "__module__": base.__module__,
            "__getattribute__": __getattribute__,
            "forward": base.forward,
            "_hra_carrier": (None, base),
        }
        kind: Any = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(names))
        kind.__qualname__ = base.__qualname__
        module.__class__ = kind

    def reads(self, module: nn.Module) -> frozenset[str]:
        """Names that were read of a module."""
        return frozenset(self._reads.get(id(module), ())) - _OF_TORCH | {"forward"}
