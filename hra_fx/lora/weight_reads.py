"""Layers whose weight another module reads: PEFT's LoRA acts where a layer is called, so it has no effect there.

The source of the modules shows which layers they read and never call, since an export has no inputs to run them with.
Other reads, as in a branch beside a call, are known once the adapted model has run (`HouseholderAdapters.is_read`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, TypeAlias

from torch import nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.target import REFLECTION, describe, find_kind, weight_name
from hra_fx.lora.unsupported import unsupported
from passes.match import METADATA

_READ = "has a weight that another module reads, where PEFT's LoRA has no effect"
#: Names after `self`, such as `("attn", "qkv", "weight")`.
_Chain: TypeAlias = tuple[str, ...]


def check_reads(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight another module reads.

    Args:
        model: the whole model.
        layers: linear layers, convolutions and attentions in it, by path.

    Raises:
        UnsupportedLayerError: naming the layer.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    known: dict[type[nn.Module], set[_Chain]] = {}
    for path, layer in layers.items():
        seen = getattr(layer._modules.get(REFLECTION), "is_read", False)
        if seen or _is_only_read(path, layer, owners, known):
            raise unsupported(path, describe(layer), _READ)


def _is_only_read(
    path: str, layer: nn.Module, owners: Mapping[str, nn.Module], known: dict[type[nn.Module], set[_Chain]]
) -> bool:
    """Whether the modules around a layer name its weight, and never the layer itself."""
    parts = path.split(".")
    uses: list[_Chain] = []
    for depth in range(len(parts)):
        kind, own = original_class(owners[".".join(parts[:depth])]), tuple(parts[depth:])
        if kind not in known:
            known[kind] = set(_chains(kind))
        uses += [chain[len(own) :] for chain in known[kind] if chain[: len(own)] == own]
    weight = weight_name(find_kind(layer) or "linear")
    reads = [use for use in uses if use[:1] == (weight,) and METADATA.isdisjoint(use[1:2])]
    return bool(reads) and not any(use[:1] in ((), ("forward",)) for use in uses)


def _chains(kind: type[nn.Module]) -> Iterator[_Chain]:
    """What the forward of a class, and the methods that it leads to, say after `self`."""
    names = ["forward"]
    for name in names:  # it grows while it is read
        for function in _functions(kind, name):
            for chain in _chains_in(function):
                yield chain
                if chain[0] not in names:
                    names.append(chain[0])


def _functions(kind: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """The methods and properties of a name, also those that `super()` finds."""
    for base in kind.__mro__:
        found: Any = None if base is nn.Module else vars(base).get(name)
        found = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", None) or found)
        if isinstance(found, FunctionType):
            yield found


def _chains_in(function: FunctionType) -> Iterator[_Chain]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # made by a program, or in the middle of a line
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in nodes}
    for node in nodes:
        names: list[str] = []
        part: ast.expr = node
        while isinstance(part, ast.Attribute):
            names.insert(0, part.attr)
            part = part.value
        if isinstance(part, ast.Name) and part.id == "self" and id(node) not in inner:
            yield tuple(names)
