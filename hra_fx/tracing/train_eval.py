"""One graph for both modes, where they differ in constants alone: each node says what it has in eval mode.

`dropout(x, 0.1, training=True)` is of that kind, as most of what differs between the modes. The graph itself is that of
train mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import fx

#: Arguments of a node, by place and by keyword.
Arguments: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
#: Key of a node's `meta`: place or keyword of an argument -> its value in eval mode.
IN_EVAL = "hra_in_eval"


def may_vary(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a node that is given these arguments in eval mode takes the same values, in the same places."""
    if node.op not in ("call_function", "call_method"):
        return False
    if len(node.args) != len(args) or list(node.kwargs) != list(kwargs):
        return False
    pairs = [*zip(node.args, args, strict=True), *((node.kwargs[key], kwargs[key]) for key in kwargs)]
    return all(is_same(a, b) or (_is_constant(a) and _is_constant(b)) for a, b in pairs)


def note(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Write down what a node has in eval mode."""
    values: dict[Any, Any] = dict(enumerate(args)) | dict(kwargs)
    node.meta[IN_EVAL] = {
        key: value
        for key, value in values.items()
        if not is_same(node.args[key] if isinstance(key, int) else node.kwargs[key], value)
    }


def put_in_mode(graph: fx.Graph, *, training: bool) -> fx.Graph:
    """Make a graph for both modes that for one of them; another graph stays as it is."""
    for node in graph.nodes:
        constants = node.meta.pop(IN_EVAL, {})
        if constants and not training:
            node.args = tuple(constants.get(place, value) for place, value in enumerate(node.args))
            node.kwargs = {name: constants.get(name, value) for name, value in node.kwargs.items()}
    return graph


def is_same(a: Any, b: Any) -> bool:
    """Whether two arguments of nodes are the same, to the type of every constant."""
    if a is b or isinstance(a, fx.Node):
        return a is b
    if isinstance(a, (tuple, list)):
        return (
            isinstance(b, tuple) is isinstance(a, tuple)
            and isinstance(b, (tuple, list))
            and len(a) == len(b)
            and all(map(is_same, a, b))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and all(is_same(getattr(a, end), getattr(b, end)) for end in _ENDS)
    return type(a) is type(b) and repr(a) == repr(b)


_ENDS = ("start", "stop", "step")


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, value.values()))
    if isinstance(value, slice):
        return all(_is_constant(getattr(value, end)) for end in _ENDS)
    return not isinstance(value, fx.Node)
