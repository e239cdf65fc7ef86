"""Functions whose calls stay calls: what cannot be traced inside of them runs as it is when the graph runs.

A module-level function that branches on a shape or turns autocast off cannot be dissolved, and need not be: as one node
of the graph it is called with the values themselves. fx has the same for names given to `torch.fx.wrap`.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format)


class OpaqueCalls:
    """The functions that stay calls, with the names under which they are called."""

    def __init__(self) -> None:
        """None so far."""
        self._places: list[tuple[dict[str, Any], str, types.FunctionType]] = []

    def add_culprit(self, error: BaseException) -> bool:
        """Add the innermost function that was running when an error was raised; `False` if there is no new one."""
        for place in _running(error):
            if all(place[0] is not space or place[1] != name for space, name, _ in self._places):
                self._places.append(place)
                return True
        return False

    @contextlib.contextmanager
    def active(self, create_proxy: Callable[..., Any]) -> Iterator[None]:
        """Calls of the functions, under those names, become nodes, which `create_proxy` makes."""
        try:
            for namespace, name, function in self._places:
                namespace[name] = _as_node(function, create_proxy)
            yield
        finally:
            for namespace, name, function in self._places:
                namespace[name] = function


def _as_node(function: types.FunctionType, create_proxy: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        found = list(_leaves((args, kwargs)))
        traced = any(issubclass(type(leaf), fx.Proxy) for leaf in found)
        if not traced or not all(issubclass(type(leaf), (fx.Proxy, *_PLAIN)) for leaf in found):
            return function(*args, **kwargs)
        proxy = create_proxy("call_function", function, args, kwargs)
        # So that fx, which traces the code of a graph to unpickle it, keeps the call too.
        object.__getattribute__(proxy, "node").meta["is_wrapped"] = True
        return proxy

    return call


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) in (list, tuple, torch.Size):
        for item in value:
            yield from _leaves(item)
    elif type(value) is dict:
        yield from _leaves([*value, *value.values()])
    elif type(value) is slice:
        yield from _leaves([value.start, value.stop, value.step])
    else:
        yield value


def _running(error: BaseException) -> Iterator[tuple[dict[str, Any], str, types.FunctionType]]:
    """Functions that were running, innermost first: the namespace and name by which each was called, and itself."""
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    for frame, caller in zip(frames[:0:-1], frames[-2::-1], strict=True):
        home = frame.f_globals.get("__name__", "").split(".")[0]
        if home not in ("torch", "hra_fx"):
            yield from _called_as(frame.f_code, caller.f_globals)


def _called_as(code: types.CodeType, namespace: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    modules = [vars(value) for value in namespace.values() if isinstance(value, types.ModuleType)]
    for space, names in ((namespace, list(namespace)), *((space, [code.co_name]) for space in modules)):
        for name in names:
            function = space.get(name)
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                home = sys.modules.get(function.__module__)
                if getattr(home, function.__qualname__, None) is function and not _may_return_none(function):
                    yield space, name, function  # a nested function could not be pickled


def _may_return_none(function: Any) -> bool:
    """Whether a function is annotated so: the forward may ask for None, and the value of a node is never None."""
    returned = str(function.__annotations__.get("return", ""))
    return any(word in returned for word in ("None", "Optional", "Any"))
