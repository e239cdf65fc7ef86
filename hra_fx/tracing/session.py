"""One set-up of fx in which many traces run: to patch the call of modules costs as much as to trace a small model."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

from torch import fx, nn


class Session(fx.Tracer):
    """Sets up fx, and leaves each trace to a tracer of its own.

    Attributes:
        tracer: whose trace is running; `None` between the traces, when modules are what they always are.
    """

    def __init__(self) -> None:
        """With no trace running."""
        super().__init__()
        self.tracer: fx.Tracer | None = None
        self.read: dict[str, Any] = {}
        self._thread = threading.get_ident()
        self._act: Callable[[], None] = lambda: None

    def run(self, root: nn.Module, act: Callable[[], None]) -> None:
        """Call `act` while fx is set up for the forward of `root`, which is not called."""
        self._act = act
        # fx walks over all modules that it is given, and each attribute of each.
        self.trace(_stand_in_for(root))

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The last step of what fx sets up: what it will call in place of the forward."""
        return self._act, []

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a module."""
        if self.tracer is None or self._is_foreign():
            return forward(*args, **kwargs)
        return self.tracer.call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter, buffer or child of a module."""
        if self.tracer is None or self._is_foreign():
            return attr_val
        return self.tracer.getattr(attr, attr_val, self.read)

    def _is_foreign(self) -> bool:
        """Whether this is another thread: fx patches modules for all, and another model may be running."""
        return threading.get_ident() != self._thread


def _stand_in_for(root: nn.Module) -> nn.Module:
    """An empty module with the forward of another one, beside which fx looks for functions that are to be nodes."""
    names = {"forward": type(root).forward}
    kind: Any = types.new_class("StandIn", (nn.Module,), exec_body=lambda body: body.update(names))
    made: nn.Module = kind()
    return made
