"""Whether a Python function always gives values, and never None: read off its source.

A call that stays one node gives a traced value, and `result is None` is False of any traced value, whatever the call
gives when it runs. So only a function that cannot give None, nor anything with None inside, may stay a call.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import logging
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_METADATA = frozenset({"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag"})
_NUMBERS = frozenset({"int", "float", "bool", "len", "abs", "round", "sum", "range"})
_CONTAINERS = frozenset({"tuple", "list", "zip", "enumerate", "reversed", "sorted", "max", "min"})
_NO_VALUE = frozenset({"_assert", "backward", "register_hook", "retain_grad", "register_post_accumulate_grad_hook"})
_NONE_INSIDE = frozenset({"multi_head_attention_forward"})
_CONTEXTS = (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.autocast)
_FILLING = frozenset({"append", "extend", "insert"})
_UNREADABLE = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Global, ast.Nonlocal, ast.Yield),
    *(ast.YieldFrom, ast.Await, ast.Try, ast.Delete, ast.Match, ast.Import, ast.ImportFrom),
)


def always_gives_values(function: types.FunctionType, known: frozenset[str], depth: int = 0) -> bool:
    """Whether every way through a function ends with values.

    Args:
        function: a function of a Python module, not of a class.
        known: parameters that are given values, without None inside; the others may be anything.
        depth: of the calls so far; what calls itself is not known to end.
    """
    definition = definition_of(function)
    if definition is None or depth > 4:
        return False
    return _Values(function, definition, known, depth).always()


@functools.cache
def definition_of(function: types.FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a plain function; `None` for one that is wrapped, nested or without source."""
    if hasattr(function, "__wrapped__") or function.__closure__ or "<" in function.__qualname__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) and tree.name == function.__name__ else None


def leaves_alone(function: types.FunctionType, parameter: str) -> bool:
    """Whether a function only looks into a container that it is given, and neither changes nor keeps it."""
    definition = definition_of(function)
    if definition is None:
        return False
    above = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    uses = (node for node in ast.walk(definition) if isinstance(node, ast.Name) and node.id == parameter)
    return all(_only_looks(use, above[use], function) for use in uses)


def _only_looks(use: ast.Name, user: ast.AST, function: types.FunctionType) -> bool:
    if isinstance(user, ast.Subscript) and user.value is use:
        return isinstance(user.ctx, ast.Load)
    if isinstance(user, ast.Assign) and user.value is use:
        return all(isinstance(target, (ast.Tuple, ast.List)) for target in user.targets)
    if isinstance(user, ast.keyword):
        return False
    if isinstance(user, ast.Call) and user.func is not use:
        called = resolved(user.func, function.__globals__)
        return is_of_torch(called) or called in (len, tuple, list, max, min, sum, zip)
    return isinstance(user, ast.Compare) or (isinstance(user, ast.For) and user.iter is use)


class _Values:
    """The names of one function that are always values where they are read, as far as its source tells."""

    def __init__(
        self, function: types.FunctionType, definition: ast.FunctionDef, known: frozenset[str], depth: int
    ) -> None:
        self._function = function
        self._definition = definition
        self._depth = depth
        parameters = {argument.arg for argument in ast.walk(definition.args) if isinstance(argument, ast.arg)}
        self._given = [(name, value) for node in ast.walk(definition) for name, value in _assigned(node)]
        self._locals = parameters | {name for name, _ in self._given}
        # The largest set of names in which each is only ever given what is a value if those are.
        self._sure = (self._locals - parameters) | (known & parameters)
        while lost := {name for name, value in self._given if name in self._sure and not self._is_sure(value)}:
            self._sure -= lost

    def always(self) -> bool:
        inside = [node for statement in self._definition.body for node in ast.walk(statement)]
        return ends_with_return(self._definition.body) and all(self._is_harmless(node) for node in inside)

    def _is_harmless(self, node: ast.AST) -> bool:
        """Whether a node neither gives nothing back, nor puts None into a container, nor does what is not seen here."""
        match node:
            case ast.Return(value):
                return self._is_sure(value)
            case ast.Assign(targets, value):
                return self._is_sure(value) or not any(isinstance(t, ast.Subscript) for t in _parts(targets))
            case ast.AugAssign(value=value):
                return self._is_sure(value)
            case ast.Attribute(ctx=context):
                return isinstance(context, ast.Load)
            case ast.Call(func):
                return self._is_sure(node) or self._only_acts(node, func)
        return not isinstance(node, _UNREADABLE)

    def _only_acts(self, call: ast.Call, func: ast.expr) -> bool:
        """Whether a call that need not give a value at least changes nothing that the function gives."""
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        if isinstance(func, ast.Attribute) and func.attr in _FILLING:
            return all(self._is_sure(argument) for argument in arguments)
        if self._root(func) in self._locals:
            return isinstance(func, ast.Attribute) and hasattr(torch.Tensor, func.attr)
        called = resolved(func, self._function.__globals__)
        if isinstance(func, ast.Attribute) and isinstance(
            resolved(func.value, self._function.__globals__), logging.Logger
        ):
            return True
        return (
            called in (isinstance, print, *_CONTEXTS)
            or is_of_torch(called)
            or (isinstance(called, types.FunctionType) and not arguments)
        )

    @staticmethod
    def _root(node: ast.expr) -> str:
        return _dotted(node).partition(".")[0]

    def _is_sure(self, node: ast.expr | None) -> bool:
        match node:
            case ast.Constant(value):
                return value is not None
            case ast.Name(name):
                return name in self._sure
            case ast.Tuple(elements) | ast.List(elements) | ast.BoolOp(values=elements):
                return all(self._is_sure(element) for element in elements)
            case ast.Starred(value) | ast.Subscript(value) | ast.NamedExpr(value=value):
                return self._is_sure(value)
            case ast.BinOp(left, _, right):  # lists may be added and multiplied too
                return self._is_sure(left) and self._is_sure(right)
            case ast.UnaryOp() | ast.Compare() | ast.JoinedStr():
                return True
            case ast.IfExp(body=body, orelse=orelse):
                return self._is_sure(body) and self._is_sure(orelse)
            case ast.ListComp(elt) | ast.GeneratorExp(elt):
                return self._is_sure(elt)
            case ast.Attribute(value, name):
                return name in _METADATA and self._is_sure(value)
            case ast.Call():
                return self._call_is_sure(node)
        return False

    def _call_is_sure(self, call: ast.Call) -> bool:
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        root = self._root(call.func)
        if root and root not in self._locals:
            called = resolved(call.func, self._function.__globals__)
            if is_of_torch(called):
                return called.__name__ not in _NO_VALUE | _NONE_INSIDE
            if isinstance(called, types.BuiltinFunctionType | type) and called.__module__ == "builtins":
                return called.__name__ in _NUMBERS or (
                    called.__name__ in _CONTAINERS and all(self._is_sure(argument) for argument in arguments)
                )
            return isinstance(called, types.FunctionType) and self._function_is_sure(called, call)
        if isinstance(call.func, ast.Attribute):
            name = call.func.attr
            return hasattr(torch.Tensor, name) and name not in _NO_VALUE and self._is_sure(call.func.value)
        return False

    def _function_is_sure(self, called: types.FunctionType, call: ast.Call) -> bool:
        names = list(inspect.signature(called).parameters)
        unpacks = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
        if unpacks or len(call.args) > len(names):
            return False
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
        known = {name for name, value in given.items() if self._is_sure(value)}
        return always_gives_values(called, frozenset(known | with_default(called) - given.keys()), self._depth + 1)


def with_default(function: Callable[..., Any]) -> set[str]:
    """Parameters whose default is a number or a string."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if isinstance(p.default, (bool, int, float, str))}


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Names that a node gives a value to, with the value, or a container of which it is a part."""
    match node:
        case ast.Assign(targets, value):
            for target in targets:
                yield from _bound(target, value)
        case ast.AnnAssign(target, value=value) | ast.NamedExpr(target, value):
            yield from _bound(target, value)
        case ast.AugAssign(ast.Name(name)):
            yield name, node.value
        case ast.For(target, iterated) | ast.comprehension(target, iterated):
            yield from _bound(target, iterated)
        case ast.withitem(optional_vars=ast.expr() as target):
            yield from _bound(target, None)


def _bound(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr | None]]:
    match target:
        case ast.Name(name):
            yield name, value
        case ast.Starred(inner):
            yield from _bound(inner, value)
        case ast.Tuple(inner) | ast.List(inner):
            given = value.elts if isinstance(value, ast.Tuple) else []
            singly = len(given) == len(inner) and not any(isinstance(part, ast.Starred) for part in (*inner, *given))
            for part, its in zip(inner, given if singly else [value] * len(inner), strict=True):
                yield from _bound(part, its)


def _parts(targets: list[ast.expr]) -> Iterator[ast.expr]:
    for target in targets:
        yield from _parts(target.elts) if isinstance(target, (ast.Tuple, ast.List)) else (target,)


def ends_with_return(statements: list[ast.stmt]) -> bool:
    """Whether no way leads through these statements to what follows."""
    last = statements[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and ends_with_return(last.body) and ends_with_return(last.orelse)
    return isinstance(last, (ast.Return, ast.Raise))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def resolved(node: ast.expr, space: Mapping[str, Any]) -> Any:
    """What a dotted name outside of a function's own names is."""
    root, *rest = _dotted(node).split(".")
    found = space.get(root, getattr(builtins, root, None) if root else None)
    for name in rest:
        found = vars(found).get(name) if isinstance(found, types.ModuleType) else None
    return found


def is_of_torch(called: Any) -> bool:
    """Whether it is an operator of torch, or a function of math."""
    home = getattr(called, "__module__", None) or ""
    return (
        callable(called)
        and not isinstance(called, type)
        and (home in ("torch", "torch.functional", "torch.nn.functional", "math") or home.startswith("torch._"))
    )
