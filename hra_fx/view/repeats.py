"""Draws identical neighbors once: `encoder.layer.0 … encoder.layer.5` becomes one block with "× 6".

Two items are identical if their signatures are equal: the same classes, names (without numbers), operations and edges
at all levels, and optionally the same shapes and ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import replace

from hra_fx.view.tree import Item, Leaf, Scope, contract, joined

_NUMBER = re.compile(r"@?\d+")


def signature(item: Item, *, sizes: bool = True) -> Hashable:
    """What two items must have in common to be drawn as one, without their own names.

    Args:
        item: the item.
        sizes: whether to compare shapes and ranks too.
    """
    if isinstance(item, Leaf):
        detail = item.detail if sizes else item.detail.partition(" ")[0]
        own = (item.width, item.rank) if sizes else ()
        return (item.kind, detail, item.op, item.count, own, "" if item.kind != "op" else item.name)
    inner = tuple((stem(part.name), signature(part, sizes=sizes)) for part in item.items)
    return (item.class_name, item.eager, item.count, inner, item.edges, item.inputs, item.outputs)


def stem(name: str) -> str:
    """A name without its numbers.

    >>> stem("layer.11"), stem("block.3.mlp"), stem("query")
    ('layer.', 'block..mlp', 'query')
    """
    return _NUMBER.sub("", name)


def runs_where(length: int, follows: Callable[[int], bool]) -> list[range]:
    """Maximal runs of at least two indices in which `follows` is true for each index but the first.

    >>> runs_where(6, lambda index: index in (1, 2, 5))
    [range(0, 3), range(4, 6)]
    """
    runs: list[range] = []
    start = 0
    for index in range(1, length + 1):
        if index < length and follows(index):
            continue
        if index - start > 1:
            runs.append(range(start, index))
        start = index
    return runs


def merge_repeats(scope: Scope) -> Scope:
    """A scope with every run of identical neighbors as one item. In a traced graph they must form a chain."""
    looks = [(stem(item.name), signature(item)) for item in scope.items]
    edges = set(scope.edges)

    def follows(index: int) -> bool:
        item = scope.items[index]
        drawable = isinstance(item, Scope) or item.kind in ("adapted_layer", "module")
        linked = scope.eager or (index - 1, index) in edges
        return drawable and linked and item.count == 1 and looks[index - 1] == looks[index]

    runs = runs_where(len(scope.items), follows)
    return contract(scope, runs, _once)


def _once(scope: Scope, run: range) -> Item:
    items = [scope.items[index] for index in run]
    return replace(_overlay(items), count=len(items), last=items[-1].name)


def _overlay(items: list[Item]) -> Item:
    """The first item, with the marks of all items at every leaf."""
    first = items[0]
    if isinstance(first, Leaf):
        return joined([item for item in items if isinstance(item, Leaf)])
    scopes = [item for item in items if isinstance(item, Scope)]
    columns = zip(*(scope.items for scope in scopes), strict=True)
    paths = tuple(path for scope in scopes for path in scope.paths)
    return replace(first, items=tuple(_overlay(list(column)) for column in columns), paths=paths)
