"""The tree of a picture: leaves (single boxes) inside scopes (modules).

The items of a scope are in topological order. So any run of neighbors can be contracted without creating a cycle: a
path that leaves the run never returns to an earlier index.

Identical neighbors are drawn once: `encoder.layer.0 … encoder.layer.5` becomes one block with "× 6". Two items are
identical if they read the same values, except that each reads its predecessor, and if their signatures are equal: the
same classes, names (without numbers), operations, edges, sizes and ranks at all levels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from hra_fx.reporting.skipped_layers import SkippedLayer

LeafKind: TypeAlias = Literal["input", "output", "adapted_layer", "module", "op", "eager"]
_NUMBER = re.compile(r"@?\d+")


@dataclass(frozen=True)
class Leaf:
    """One box: a node of a traced graph, or a module that is not traced."""

    name: str  # inside its module
    detail: str  # class and shape, or the parameters that an operation reads
    kind: LeafKind  # how it is drawn; "eager" for a module without an adapter that is not traced
    target: str  # qualified name of the module, or name of the function
    place: tuple[str, ...]  # qualified names of its parents, outermost first; the n-th call of one has `@n` appended
    marks: tuple[str, ...] = ()  # paths of the adapted layers in it; empty for later calls of a shared layer
    width: int = 0  # length `d` of the reflection vectors
    rank: int = 0  # number of reflection vectors in use, over all adapters
    skipped: tuple[SkippedLayer, ...] = ()  # the layers in it without an adapter
    trained: tuple[str, ...] = ()  # paths of the layers in it that are trained in full
    shape: str = ""  # of the value, "1×64×56×56", if known
    count: int = 1  # number of identical neighbors that are drawn as this box
    last: str = ""  # name of the last of these neighbors


@dataclass(frozen=True)
class Scope:
    """A module with its contents."""

    path: str  # "" for the model
    name: str  # below the enclosing scope
    class_name: str
    is_traced: bool  # if not, its items are in the order of definition, without edges
    items: tuple[Item, ...]  # in topological order
    edges: tuple[Edge, ...] = ()
    ports: tuple[str, ...] = ()  # for each value from outside, the box or module that it comes from
    outputs: tuple[int, ...] = ()  # items with a value that is read outside
    count: int = 1  # number of identical neighbors that are drawn as this scope
    last: str = ""  # name of the last of these neighbors

    @property
    def marks(self) -> tuple[str, ...]:
        """The paths of all adapted layers inside, in order."""
        return tuple(mark for item in self.items for mark in item.marks)

    @property
    def skipped(self) -> tuple[SkippedLayer, ...]:
        """The layers inside without an adapter."""
        return tuple(dict.fromkeys(layer for item in self.items for layer in item.skipped))

    @property
    def trained(self) -> tuple[str, ...]:
        """The paths of the layers inside that are trained in full."""
        return tuple(dict.fromkeys(path for item in self.items for path in item.trained))


Item: TypeAlias = Leaf | Scope


class Edge(NamedTuple):
    """An edge of a scope: item `target` reads, at its port `port`, a value of item `source < target`.

    A negative source is port `~source` of the scope. The port is 0 if the target is a leaf.
    """

    source: int
    target: int
    port: int
    shape: str = ""  # of the value, "1×64×56×56", if known


def joined(leaves: Sequence[Leaf]) -> Leaf:
    """The first of several leaves, with the layers of all leaves."""
    return replace(
        leaves[0],
        marks=tuple(mark for leaf in leaves for mark in leaf.marks),
        skipped=tuple(dict.fromkeys(layer for leaf in leaves for layer in leaf.skipped)),
        trained=tuple(dict.fromkeys(path for leaf in leaves for path in leaf.trained)),
    )


def contract(scope: Scope, follows: Callable[[int], bool], combine: Callable[[tuple[Item, ...]], Item]) -> Scope:
    """Replace each run of neighboring items, for which `follows` is true from the second on, by one item."""
    items: list[Item] = []
    where: dict[int, int] = {}
    start = 0
    for index in range(1, len(scope.items) + 1):
        if index < len(scope.items) and follows(index):
            continue
        where.update(dict.fromkeys(range(start, index), len(items)))
        run = scope.items[start:index]
        items.append(combine(run) if len(run) > 1 else run[0])
        start = index
    moved = (
        edge._replace(source=where.get(edge.source, edge.source), target=where[edge.target]) for edge in scope.edges
    )
    edges = {edge for edge in moved if edge.source != edge.target}
    outputs = tuple(sorted({where[i] for i in scope.outputs}))
    return replace(scope, items=tuple(items), edges=tuple(sorted(edges)), outputs=outputs)


def prefixes(path: str) -> list[str]:
    """The qualified names of a module and its parents, outermost first.

    >>> prefixes("a.b.c"), prefixes("")
    (['a', 'a.b', 'a.b.c'], [])
    """
    parts = path.split(".") if path else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def name_of(path: str) -> str:
    """The last part of a qualified name; if it is a number, with the part before it.

    >>> name_of("encoder.layer.0.query"), name_of("encoder.layer.0")
    ('query', 'layer.0')
    """
    parts = path.split(".")
    start = -2 if len(parts) > 1 and parts[-1].partition("@")[0].isdigit() else -1
    return ".".join(parts[start:])


def module_of(call: str) -> str:
    """The module of a place: the n-th call of a module has `@n` appended.

    >>> module_of("encoder.layer@2"), module_of("encoder.layer")
    ('encoder.layer', 'encoder.layer')
    """
    path, _, number = call.rpartition("@")
    return path if path and number.isdigit() else call


def span(item: Item) -> str:
    """The name of an item, or of the first and the last item that it represents, with their number.

    >>> span(Leaf("layer.0", "", "module", "layer.0", (), count=6, last="layer.5"))
    'layer.0 … 5 × 6'
    """
    pairs = zip(item.name.split("."), (item.last or item.name).split("."), strict=True)
    name = ".".join(first if first == last else f"{first} … {last}" for first, last in pairs)
    return name + f" × {item.count}" * (item.count > 1)


def signature(item: Item) -> Hashable:
    """The properties that two items must share to be drawn as one, without their own names."""
    if isinstance(item, Leaf):
        name = item.name if item.kind == "op" else ""
        return (item.kind, item.detail, item.count, item.width, item.rank, name)
    inner = tuple((stem(part.name), signature(part)) for part in item.items)
    edges = tuple(dict.fromkeys(edge[:3] for edge in item.edges))
    return (item.class_name, item.count, inner, edges, len(item.ports), item.outputs)


def stem(name: str) -> str:
    """A name without its numbers.

    >>> stem("layer.11"), stem("block.3.mlp"), stem("query")
    ('layer.', 'block..mlp', 'query')
    """
    return _NUMBER.sub("", name)


def merge_repeats(scope: Scope) -> Scope:
    """Merge every run of identical neighbors in a scope into one item. In a traced graph, they must form a chain."""
    looks = [(stem(item.name), signature(item)) for item in scope.items]
    reads: list[set[tuple[int, int]]] = [set() for _ in looks]  # (port, source) of each item
    for source, target, port, _ in scope.edges:
        reads[target].add((port, source))

    def follows(index: int) -> bool:
        item = scope.items[index]
        drawable = isinstance(item, Scope) or item.kind in ("adapted_layer", "module")
        if not drawable or item.count > 1 or looks[index - 1] != looks[index]:
            return False
        chain = {port for port, source in reads[index] if source == index - 1}
        others = {(port, source) for port, source in reads[index] if source != index - 1}
        same = others == {(port, source) for port, source in reads[index - 1] if port not in chain}
        return not scope.is_traced or (bool(chain) and same)

    return contract(
        scope, follows, lambda run: replace(_overlay(run), count=len(run), last=run[-1].last or run[-1].name)
    )


def _overlay(items: Sequence[Item]) -> Item:
    """The first item, with the marks of all items at every leaf."""
    first = items[0]
    if isinstance(first, Leaf):
        return joined([item for item in items if isinstance(item, Leaf)])
    scopes = [item for item in items if isinstance(item, Scope)]
    columns = zip(*(scope.items for scope in scopes), strict=True)
    names = (tuple(dict.fromkeys(column)) for column in zip(*(scope.ports for scope in scopes), strict=True))
    ports = tuple(first if not others else f"{first.removesuffix(' …')} …" for first, *others in names)
    return replace(first, items=tuple(map(_overlay, columns)), ports=ports)
