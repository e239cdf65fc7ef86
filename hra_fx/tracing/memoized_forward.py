"""A forward that remembers a value from call to call, and says what it is when it is traced: a graph computes it anew.

In eval mode the attention biases of levit and its kin are looked up once, and kept in a dictionary on the module; while
`torch.jit.is_tracing()` they are looked up each time. Such a method, and no other, is told that it is traced.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch

_IS_TRACING = ast.dump(ast.parse("torch.jit.is_tracing()", mode="eval").body)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Methods that only remember what they could compute anew compute it, as long as they remember nothing yet."""
    original: Callable[[], bool] = vars(torch.jit)["is_tracing"]
    thread = threading.get_ident()

    def is_tracing() -> bool:
        return original() or (threading.get_ident() == thread and _only_remembers(sys._getframe(1)))

    with mock.patch.object(torch.jit, "is_tracing", is_tracing):
        yield


def _only_remembers(frame: types.FrameType) -> bool:
    memory = _memories(frame.f_code.co_filename).get(frame.f_code.co_firstlineno)
    return memory is not None and vars(frame.f_locals.get("self", object)).get(memory) == {}


@functools.cache
def _memories(path: str) -> dict[int, str]:
    """Line of a method of a file -> the attribute that it remembers in."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    methods = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not node.decorator_list)
    return {method.lineno: memory for method in methods if (memory := _memory(method))}


def _memory(method: ast.FunctionDef) -> str | None:
    """The attribute `m` of a method that does no more than

        if torch.jit.is_tracing() or ...:
            return value
        else:
            key = ...
            if key not in self.m:
                self.m[key] = value
            return self.m[key]

    with a value that is the same for each key: made of what `self` holds, and of no call.
    """
    match method.body[-1:]:
        case [
            ast.If(ast.BoolOp(ast.Or(), [asked, *_]), [ast.Return(ast.expr() as value)], [ast.Assign() as key, *rest])
        ]:
            pass
        case _:
            return None
    match key.targets, rest:
        case [ast.Name(name)], [ast.If(ast.Compare(_, [ast.NotIn()], [ast.Attribute(_, memory)])), _]:
            pass
        case _:
            return None
    expected = ast.parse(
        f"if {name} not in self.{memory}:\n  self.{memory}[{name}] = {ast.unparse(value)}\nreturn self.{memory}[{name}]"
    )
    inside = list(ast.walk(value))
    of_self = all(node.id == "self" for node in inside if isinstance(node, ast.Name))
    plain = not any(isinstance(node, (ast.Call, ast.Lambda, ast.NamedExpr)) for node in inside)
    same = [ast.dump(node) for node in rest] == [ast.dump(node) for node in expected.body]
    alone = all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in method.body[:-1])
    return memory if ast.dump(asked) == _IS_TRACING and of_self and plain and same and alone else None
