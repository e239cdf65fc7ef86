"""Layers whose weight another module reads itself, so that it would not see reflections of their input.

So do `nn.MultiheadAttention` (`out_proj`), torchvision's Swin (`qkv`, `proj`), timm's EVA (`qkv`) and transformers'
Mamba (`dt_proj`). PEFT adapts such layers without effect, and changes the output when it merges. The sources of a
module's class tell, whether or not it can be traced.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hra_fx.layers.class_swap import original_class
from hra_fx.sources import names_below_self, reached_definitions
from hra_fx.tracing.weight_reads import METADATA


def weight_readers(model: nn.Module, sites: Mapping[str, nn.Module]) -> dict[str, str]:
    """Sites whose weight the code of another module reads, by whatever path it reaches the layer.

    Args:
        model: the model.
        sites: path -> layer.

    Returns:
        site path -> `"<module path> (<class>.<method>)"` of the reader.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2))
        >>> weight_readers(model, {"0.out_proj": model[0].out_proj})
        {'0.out_proj': '0 (MultiheadAttention.forward)'}
    """
    first = {layer: path for path, layer in sites.items()}
    paths = model.named_modules(remove_duplicate=False)
    wanted = {path: first[module] for path, module in paths if module in first}
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind: Any = original_class(module)
        for child, method in _reads(kind):
            site = wanted.get(f"{path}.{child}".lstrip("."))
            if site is not None:
                found.setdefault(site, f"{path or 'the model'} ({kind.__name__}.{method})")
    return found


@functools.cache
def _reads(kind: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of a path below `self` whose weight is used, and the method that does: forward and what it calls."""
    methods = [(name, method) for name, found in reached_definitions(kind).items() for method in found]
    return tuple(dict.fromkeys((child, name) for name, method in methods for child in _used_weights(method)))


def _used_weights(method: ast.FunctionDef) -> Iterator[str]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or node.attr != "weight" or not isinstance(node.ctx, ast.Load):
            continue
        names = names_below_self(node.value)
        if names and not _is_question(node, parents[node]):
            yield ".".join(names)


def _is_question(node: ast.Attribute, parent: ast.AST) -> bool:
    """Whether a weight is only asked what it is: its dtype, whether it is None, its type."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in METADATA
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "type", "id", "len")
    return isinstance(parent, (ast.If, ast.IfExp, ast.BoolOp)) and getattr(parent, "test", node) is node
