"""Layers that are held but not called: another module reads their weight itself, and would not see their reflections.

So do `nn.MultiheadAttention` (`out_proj`), torchvision's Swin (`qkv`, `proj`), timm's EVA (`qkv`) and transformers'
Mamba (`dt_proj`). PEFT adapts such layers without effect, and changes the output when it merges. The sources of a
module's class tell, whether or not it can be traced.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from hra_fx.carrier.swap import original_class

#: What may be asked of a weight without using it.
_METADATA = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad", "element_size"}
)


def weight_readers(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Sites whose weight the code of another module reads.

    Args:
        model: the model.
        sites: paths of its sites.

    Returns:
        site path -> `"<module path> (<class>.<method>)"` of the reader.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2))
        >>> weight_readers(model, ["0.out_proj"])
        {'0.out_proj': '0 (MultiheadAttention.forward)'}
    """
    wanted = set(sites)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind: Any = original_class(module)
        for child, method in _reads(kind):
            site = f"{path}.{child}".lstrip(".")
            if site in wanted:
                found.setdefault(site, f"{path or 'the model'} ({kind.__name__}.{method})")
    return found


@functools.cache
def _reads(kind: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of a path below `self` whose weight is used, and the method that does: forward and what it calls."""
    methods = _methods(kind)
    reached, pending = set[str](), ["forward"]
    while pending:
        name = pending.pop()
        if name in methods and name not in reached:
            reached.add(name)
            chains = (_names_below_self(node) for node in ast.walk(methods[name]))
            pending.extend(chain[0] for chain in chains if len(chain) == 1)
    return tuple(
        dict.fromkeys((child, name) for name in methods if name in reached for child in _used_weights(methods[name]))
    )


def _methods(kind: Any) -> dict[str, ast.FunctionDef]:
    methods: dict[str, ast.FunctionDef] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, nn.Module) and base is not nn.Module:
            methods |= {node.name: node for node in ast.walk(_source(base)) if isinstance(node, ast.FunctionDef)}
    return methods


@functools.cache
def _source(kind: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made in a console or by exec: there is nothing to read
        return ast.Module(body=[], type_ignores=[])


def _used_weights(method: ast.FunctionDef) -> Iterator[str]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if (
            not isinstance(node, ast.Attribute)
            or node.attr not in ("weight", "bias")
            or not isinstance(node.ctx, ast.Load)
        ):
            continue
        names = _names_below_self(node.value)
        if names and not _is_question(node, parents[node]):
            yield ".".join(names)


def _names_below_self(node: ast.AST) -> list[str]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return names[::-1] if isinstance(node, ast.Name) and node.id == "self" else []


def _is_question(node: ast.Attribute, parent: ast.AST) -> bool:
    """Whether a weight is only asked what it is: its dtype, whether it is None, its type."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _METADATA
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "type", "id", "len")
    return isinstance(parent, (ast.If, ast.IfExp, ast.BoolOp)) and getattr(parent, "test", node) is node
