"""How a module is called: which arguments are tensors, and what the others are. A graph is made for one such way.

Without a call to look at, the arguments that have no default are tensors and the others keep their defaults. A call
that was observed fixes all of them. Whatever is called in another way runs the Python forward.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hra_fx.errors import CaptureError
from hra_fx.sources import reached_methods

_Kind = inspect.Parameter
_BY_PLACE = (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD)
_VARIADIC = (_Kind.VAR_POSITIONAL, _Kind.VAR_KEYWORD)
#: Values that are what they look like.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_FIXED = (torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)


class TensorSlot:
    """The place of a tensor among the arguments."""

    def __repr__(self) -> str:
        """The same for all."""
        return "tensor"

    def __reduce__(self) -> str:
        """There is one, also in a copy or a pickle."""
        return "_SLOT"


_SLOT = TensorSlot()


class Calling:
    """One way to call a forward.

    Attributes:
        names: of the tensors, in the order in which `tensors` gives them: the placeholders of a graph.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        values: Mapping[str, Any],
        *,
        by_place: int | None = None,
        ignores_others: bool = False,
    ) -> None:
        """A way in which each argument is a constant, a tensor, or a tuple, list or dict of these.

        Args:
            forward: an unbound forward, `self` first.
            values: argument -> value, for every argument that is given; a tensor stands for any tensor.
            by_place: how many were given by place; `None` for those that have no default.
            ignores_others: whether other keyword arguments make no difference.

        Raises:
            CaptureError: a value is of another kind, or none has a tensor in it.
        """
        parameters = _parameters(forward)
        self._by_place = tuple(p.name for p in parameters if p.kind in _BY_PLACE)
        self._only_by_place = tuple(p.name for p in parameters if p.kind is _Kind.POSITIONAL_ONLY)
        self._optional = frozenset(optional_arguments(forward))
        # Those that are known to be the same in a copy and a pickle.
        self._defaults = {p.name: p.default for p in parameters if _is_constant(p.default)}
        self._shapes = {name: _shape(name, value) for name, value in values.items()}
        self._ignores_others = ignores_others
        self.names = tuple(name for argument, shape in self._shapes.items() for name in _slots(argument, shape))
        if not self.names:
            raise CaptureError("forward has no argument that every call must give")
        self._placed = by_place
        # A decorator may ask what was given by place and what by keyword, and whether it was given at all.
        self._is_decorated = hasattr(forward, "__wrapped__")
        args, kwargs = self.arguments(iter(self.names))
        self._layout = (len(args), frozenset(kwargs))
        # The common case, tensors by place and nothing else, is looked at without a dictionary.
        by_place_alone = self._layout == (len(self.names), frozenset()) or not self._is_decorated
        self._is_plain = by_place_alone and self.names == tuple(self._shapes) == self._by_place[: len(self.names)]

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
        """The tensors of a call, in the order of `names`; `None` for a call that is made in another way.

        A tensor that is given twice is another way, for a forward may ask whether two arguments are the same.
        """
        if self._is_plain and not kwargs and len(args) == len(self.names):
            found = list(args)
            fits = all(isinstance(value, Tensor) for value in found)
        else:
            found = []
            fits = self._fits(args, kwargs, found)
        return found if fits and len({id(value) for value in found}) == len(found) else None

    def _fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: list[Tensor]) -> bool:
        given = dict(zip(self._by_place, args, strict=False))
        if len(args) > len(self._by_place) or not kwargs.keys().isdisjoint((*given, *self._only_by_place)):
            return False
        if self._is_decorated and self._layout != (len(args), frozenset(kwargs)):
            return False
        given.update(kwargs)
        for name, shape in self._shapes.items():
            if name not in given or not _fits(shape, given.pop(name), found):
                return False
        # What was not given when the graph was made must be as if it were not given now.
        return all(
            name in self._defaults and _is_same(self._defaults[name], value)
            if name in self._optional
            else self._ignores_others
            for name, value in given.items()
        )

    def is_like(self, other: Calling) -> bool:
        """Whether another way is the same."""
        same_layout = self._layout == other._layout or not self._is_decorated
        return same_layout and repr(self._shapes) == repr(other._shapes)

    def arguments(self, tensors: Iterator[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call, positional and by keyword, with these in the places of the tensors."""
        filled = {name: _filled(shape, tensors) for name, shape in self._shapes.items()}
        placed = self._by_place[: self._placed]
        if self._placed is None:
            must = (name in self._only_by_place or name not in self._optional for name in placed)
            placed = tuple(name for name, by_place in zip(placed, must, strict=True) if by_place and name in filled)
        return [filled.pop(name) for name in placed], filled


def unobserved(kind: Any) -> Calling:
    """The way to call a module of a class of which nothing more is known: what must be given is a tensor.

    There are no variadic arguments then; other keyword arguments may be given where the forward has no use for them.

    Raises:
        CaptureError: there is no argument that every call gives.
    """
    parameters = [p for p in _parameters(kind.forward) if p.kind not in _VARIADIC and p.default is _Kind.empty]
    return Calling(kind.forward, {p.name: _SLOT for p in parameters}, ignores_others=_ignores_others(kind))


def observed(kind: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calling:
    """The way in which a module of a class was called.

    Raises:
        CaptureError: it was called with something that no graph can have for an argument.
    """
    bound = inspect.signature(kind.forward).bind(None, *args, **kwargs)
    values = dict(list(bound.arguments.items())[1:])
    ignores_others = _ignores_others(kind)
    for parameter in _parameters(kind.forward):
        if parameter.kind is _Kind.VAR_POSITIONAL and values.pop(parameter.name, ()):
            raise CaptureError(f"it is called with more arguments by place than it names (*{parameter.name})")
        if parameter.kind is _Kind.VAR_KEYWORD:
            others = values.pop(parameter.name, {})
            values |= {} if ignores_others else others
    return Calling(kind.forward, values, by_place=len(args), ignores_others=ignores_others)


def optional_arguments(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have a default."""
    return [p.name for p in _parameters(forward) if p.default is not _Kind.empty]


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """All but `self`."""
    return list(inspect.signature(forward).parameters.values())[1:]


@functools.cache
def _ignores_others(kind: Any) -> bool:
    """Whether a forward takes any keyword argument and, by its source, does nothing with it."""
    taken = [p.name for p in _parameters(kind.forward) if p.kind is _Kind.VAR_KEYWORD]
    forward = reached_methods(kind).get("forward")
    # A decorator, and locals(), see them too.
    if not taken or forward is None or forward.decorator_list:
        return False
    # A class body may say `forward = other`.
    if forward.lineno != getattr(getattr(kind.forward, "__code__", None), "co_firstlineno", None):
        return False
    names = {node.id for statement in forward.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names.isdisjoint((*taken, "locals", "vars", "dir", "eval", "exec"))


def _is_constant(value: Any) -> bool:
    return type(value) in _CONSTANTS or isinstance(value, _FIXED)


def _is_same(constant: Any, value: Any) -> bool:
    if type(value) is not type(constant):
        return False
    # 0.0 == -0.0, which divides otherwise; and nan is not nan.
    return repr(value) == repr(constant) if isinstance(value, (float, complex)) else bool(value == constant)


def _shape(name: str, value: Any) -> Any:
    """A value with slots for its tensors."""
    if isinstance(value, (Tensor, TensorSlot)):
        return _SLOT
    if type(value) in (tuple, list):
        return type(value)(_shape(name, item) for item in value)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: _shape(name, item) for key, item in value.items()}
    if _is_constant(value):
        return value
    raise CaptureError(f"it is called with {name}, a {type(value).__name__}, which may change from call to call")


def _slots(name: str, shape: Any) -> Iterator[str]:
    if isinstance(shape, TensorSlot):
        yield name
    elif isinstance(shape, (tuple, list, dict)):
        items = shape.items() if isinstance(shape, dict) else enumerate(shape)
        for key, item in items:
            yield from _slots(re.sub(r"\W", "_", f"{name}_{key}"), item)


def _fits(shape: Any, value: Any, found: list[Tensor]) -> bool:
    if isinstance(shape, TensorSlot):
        found.append(value)
        return isinstance(value, Tensor)
    if type(value) is not type(shape):
        return False
    if isinstance(shape, (tuple, list)):
        return len(shape) == len(value) and all(_fits(a, b, found) for a, b in zip(shape, value, strict=True))
    if isinstance(shape, dict):
        return list(shape) == list(value) and all(_fits(item, value[key], found) for key, item in shape.items())
    return _is_same(shape, value)


def _filled(shape: Any, tensors: Iterator[Any]) -> Any:
    if isinstance(shape, TensorSlot):
        return next(tensors)
    if isinstance(shape, (tuple, list)):
        return type(shape)(_filled(item, tensors) for item in shape)
    if isinstance(shape, dict):
        return {key: _filled(item, tensors) for key, item in shape.items()}
    return shape
