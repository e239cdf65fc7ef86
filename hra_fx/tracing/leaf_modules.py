"""Modules that a graph calls as they are: what they give must be known, for a traced value is never None.

Nor is it ever a tuple, whatever the call gives when it runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.sources import reached_methods
from hra_fx.tracing.returns_values import always_gives_values, ends_with_return, is_of_torch, resolved

#: Expressions that may be a tensor; a constant, a tuple and their like are none.
_POSSIBLE = (ast.BinOp, ast.UnaryOp, ast.Name, ast.Subscript, ast.Attribute)
#: What may bind a name, or keep a value, by another way than an assignment.
_UNCLEAR = (ast.AnnAssign, ast.NamedExpr, ast.For, ast.While, ast.With, ast.Try, ast.Global, ast.Nonlocal, ast.Yield)


def why_not_called(module: nn.Module) -> str | None:
    """Why the call of a module cannot be a node, if it cannot: its class is not torch's, and may give no tensor.

    Example:
        >>> why_not_called(nn.Linear(2, 2)) is None
        True
    """
    kind: Any = original_class(module)
    if kind.forward.__module__.startswith("torch.") or (not _is_attention(module) and _gives_a_tensor(kind)):
        return None
    return "its class has a forward of its own, which by its source may give another thing than a tensor, or do more"


def given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
    """What a call gives in a trace: an attention without weights gives None beside its output.

    Args:
        module: the module that is called.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        result: the traced value that stands for all of it.

    Raises:
        CaptureError: a value decides whether there are weights, or the call may do more than give something.
    """
    kind: Any = original_class(module)
    filled = any(type(value) in (list, dict) for value in (*args, *kwargs.values()))
    if filled and not kind.forward.__module__.startswith("torch."):
        raise CaptureError("it is given a list or dictionary, which its class may change")
    if kind.forward is nn.Identity.forward:
        return args[0] if args else kwargs.get("input", result)
    if not _is_attention(module):
        return result
    wanted = kwargs["need_weights"] if "need_weights" in kwargs else args[4] if len(args) > 4 else True
    if type(wanted) is not bool:
        raise CaptureError("a value decides whether an attention gives its weights")
    return result if wanted else (result[0], None)


def _is_attention(module: nn.Module) -> bool:
    return issubclass(original_class(module), nn.MultiheadAttention)


@functools.cache
def _gives_a_tensor(kind: Any) -> bool:
    """Whether every way through a forward ends with what may be a tensor, and nothing is kept or changed on the way."""
    forward = reached_methods(kind).get("forward")
    if forward is None or not ends_with_return(forward.body):
        return False
    nodes = list(ast.walk(forward))
    if any(isinstance(node, _UNCLEAR) or (isinstance(node, ast.Attribute) and _is_stored(node)) for node in nodes):
        return False
    assigned: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(node.value)
    values = [node.value for node in nodes if isinstance(node, ast.Return)]
    named = [value for returned in values if isinstance(returned, ast.Name) for value in assigned.get(returned.id, [])]
    space = getattr(kind.forward, "__globals__", {})
    return all(_may_be_tensor(value, kind, space) for value in [*values, *named])


def _is_stored(node: ast.Attribute) -> bool:
    return not isinstance(node.ctx, ast.Load)


def _may_be_tensor(value: ast.expr | None, kind: Any, space: dict[str, Any]) -> bool:
    """A call of an operator of torch, of a function that always gives values, or of a method of a value."""
    if not isinstance(value, ast.Call):
        return isinstance(value, _POSSIBLE)
    if not isinstance(value.func, ast.Attribute):
        called = space.get(value.func.id) if isinstance(value.func, ast.Name) else None
        plain = isinstance(called, types.FunctionType) and always_gives_values(called, _parameters(called))
        return plain or is_of_torch(called)
    if is_of_torch(resolved(value.func, space)):
        return True
    own = value.func.value
    if isinstance(own, ast.Call):  # super().forward(...), or a method of what a call gives
        return isinstance(own.func, ast.Attribute) or _base_is_of_torch(kind)
    if isinstance(own, ast.Name) and own.id == next(iter(inspect.signature(kind.forward).parameters)):
        return str(getattr(getattr(kind, value.func.attr, None), "__module__", "")).startswith("torch.")
    return not isinstance(own, ast.Name) or own.id not in space


def _parameters(function: types.FunctionType) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _base_is_of_torch(kind: Any) -> bool:
    after = next((base for base in kind.__mro__[1:] if "forward" in vars(base)), None)
    return after is not None and after.__module__.startswith("torch.")
