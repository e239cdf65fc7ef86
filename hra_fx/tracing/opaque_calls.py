"""Functions whose calls are kept: what cannot be traced inside of them runs as it is, whenever the graph runs.

A function of a Python module that branches on a shape, loops over a value or turns autocast off cannot be dissolved,
and need not be: as one node of the graph it is called with the values themselves. It must be certain to give values
(`solid`), to leave the containers that it is given as they are, and to see no module.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from hra_fx.tracing.returns_values import always_gives_values, leaves_alone, with_default

_PLAIN = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format)


class Keeping:
    """The functions that are kept in one trace, and when it is repeated, with the names under which they are called."""

    def __init__(self) -> None:
        """None so far."""
        self._places: list[tuple[dict[str, Any], str, types.FunctionType]] = []

    def add_culprit(self, error: BaseException) -> bool:
        """Keep the innermost function on the way to an error that can be kept; `False` if there is no new one."""
        for place in _functions_on_the_way(error):
            if all(place[0] is not space or place[1] != name for space, name, _ in self._places):
                self._places.append(place)
                return True
        return False

    @contextlib.contextmanager
    def active(self, create_proxy: Callable[..., Any]) -> Iterator[None]:
        """Calls of the functions, under those names, become nodes, which `create_proxy` makes."""
        try:
            for namespace, name, function in self._places:
                namespace[name] = _keeping(function, create_proxy)
            yield
        finally:
            for namespace, name, function in self._places:
                namespace[name] = function


def _keeping(function: types.FunctionType, create_proxy: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not may_be_kept(function, args, kwargs):
            return function(*args, **kwargs)
        proxy = create_proxy("call_function", function, args, kwargs)
        # So that fx, which traces the code of a graph to unpickle it, keeps the call too.
        object.__getattribute__(proxy, "node").meta["is_wrapped"] = True
        return proxy

    return call


def may_be_kept(function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a node can stand for a call: it takes traced values and plain ones, and gives values."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    leaves = {name: list(_leaves(value)) for name, value in arguments.items()}
    found = [leaf for of_one in leaves.values() for leaf in of_one]
    traced = any(issubclass(type(leaf), fx.Proxy) for leaf in found)
    if not traced or not all(issubclass(type(leaf), (fx.Proxy, *_PLAIN)) for leaf in found):
        return False
    if not all(_is_safe(function, name, value) for name, value in arguments.items()):
        return False
    known = {name for name, of_one in leaves.items() if all(leaf is not None for leaf in of_one)}
    return always_gives_values(function, frozenset(known | with_default(function) - arguments.keys()))


def _is_safe(function: types.FunctionType, name: str, value: Any) -> bool:
    """Whether the function cannot change the argument, which would be a copy where a node has it."""
    if type(value) in (list, dict):
        inside = value.values() if type(value) is dict else value
        return not any(_has_containers(item) for item in inside) and leaves_alone(function, name)
    return not _has_containers(value)


def _has_containers(value: Any) -> bool:
    return type(value) in (list, dict) or (type(value) is tuple and any(_has_containers(item) for item in value))


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


def _functions_on_the_way(error: BaseException) -> Iterator[tuple[dict[str, Any], str, types.FunctionType]]:
    """Functions that were running, innermost first: the namespace and name by which each was called, and itself."""
    frames: list[types.FrameType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    for frame in reversed(frames):
        home = frame.f_globals.get("__name__", "").split(".")[0]
        if home not in ("torch", "hra_fx") and frame.f_back is not None:
            yield from _called_as(frame.f_code, frame.f_back.f_globals)


def _called_as(code: types.CodeType, namespace: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    modules = [vars(value) for value in namespace.values() if isinstance(value, types.ModuleType)]
    for space, names in ((namespace, list(namespace)), *((space, [code.co_name]) for space in modules)):
        for name in names:
            function = space.get(name)
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                home = sys.modules.get(function.__module__)
                if getattr(home, function.__qualname__, None) is function:  # else no graph could be pickled
                    yield space, name, function
