"""The source of module classes as syntax trees: what a forward says, whether or not it can be traced."""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def reached_methods(kind: Any) -> dict[str, ast.FunctionDef]:
    """The methods of a module class that its forward reaches through `self`, itself included.

    A class without source (made in a console or by exec) has none.

    Example:
        >>> list(reached_methods(nn.Bilinear))
        ['forward']
    """
    return {name: definitions[0] for name, definitions in reached_definitions(kind).items()}


@functools.cache
def reached_definitions(kind: Any) -> dict[str, tuple[ast.FunctionDef, ...]]:
    """As `reached_methods`, with the definitions of base classes to which `super()` leads, after the class's own."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in kind.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module and (tree := _definition(base)):
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    methods.setdefault(node.name, []).append(node)
    reached: dict[str, tuple[ast.FunctionDef, ...]] = {}
    pending = ["forward"]
    while pending:
        name = pending.pop()
        if name in methods and name not in reached:
            reached[name] = tuple(_up_to_the_last(methods[name]))
            inside = (node for definition in reached[name] for node in ast.walk(definition))
            pending.extend(chain[0] for node in inside if len(chain := names_below_self(node)) == 1)
    return reached


def _up_to_the_last(definitions: list[ast.FunctionDef]) -> Iterator[ast.FunctionDef]:
    for definition in definitions:
        yield definition
        if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(definition)):
            return


def functions_of(definition: ast.FunctionDef, space: Mapping[str, Any]) -> Iterator[types.FunctionType]:
    """The plain functions, not of torch, that a definition calls by a bare name.

    Args:
        definition: of a function.
        space: the names of the Python module that it stands in.
    """
    for node in ast.walk(definition):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found = space.get(node.func.id)
            if isinstance(found, types.FunctionType) and found.__module__.split(".")[0] != "torch":
                yield found


def names_below_self(node: ast.AST) -> list[str]:
    """`["a", "b"]` for the expression `self.a.b`, else nothing."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return names[::-1] if isinstance(node, ast.Name) and node.id == "self" else []


def can_be_written(name: str) -> bool:
    """Whether fx can write a module's name into the code of a graph, which it does between bare quotation marks."""
    if name.isascii() and name.replace(".", "").replace("_", "").isalnum():  # as nearly all are
        return True
    try:
        return bool(ast.literal_eval(f'"{name}"') == name)
    except (SyntaxError, ValueError):
        return False


def _definition(kind: type) -> ast.ClassDef | None:
    try:
        path = inspect.getsourcefile(kind)
        return _classes(path).get(kind.__qualname__) if path else None
    except (OSError, TypeError, SyntaxError, UnicodeDecodeError):
        return None


@functools.cache
def _classes(path: str) -> dict[str, ast.ClassDef]:
    """Every class of a file by its qualified name. `inspect.getsource` would parse the file for each class anew."""
    found: dict[str, ast.ClassDef] = {}
    with open(path, encoding="utf-8") as file:
        pending: list[tuple[str, ast.AST]] = [("", ast.parse(file.read()))]
    while pending:
        prefix, node = pending.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[f"{prefix}{child.name}"] = child
                pending.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                pending.append((f"{prefix}{child.name}.<locals>.", child))
            elif isinstance(child, ast.stmt):
                pending.append((prefix, child))
    return found
