"""The tree of a picture: leaves (single boxes) inside scopes (modules).

The items of a scope are in topological order. So any run of neighbors can be contracted without creating a cycle: a
path that leaves the run never returns to an earlier index.

Identical neighbors are drawn once: `encoder.layer.0 … encoder.layer.5` becomes one block with "× 6". Two items are
identical if they read the same values, except that each reads its predecessor, and if their signatures are equal: the
same classes, names (without numbers), operations and edges at all levels, and optionally the same sizes and ranks.
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
    kind: LeafKind  # how it is drawn
    op: str  # the fx opcode; "eager" for a module that is not traced
    target: str  # qualified name of the module, or name of the function
    place: tuple[str, ...]  # qualified names of its parents, outermost first; the n-th call of one has `@n` appended
    marks: tuple[str, ...] = ()  # paths of the adapted layers in it; empty for later calls of a shared layer
    width: int = 0  # length `d` of the reflection vectors
    rank: int = 0  # number of reflection vectors in use, over all adapters
    count: int = 1  # number of identical neighbors that are drawn as this box
    last: str = ""  # name of the last of these neighbors
    paths: tuple[str, ...] = ()  # qualified names of the modules in it; empty for an operation
    readers: tuple[str, ...] = ()  # of the modules whose forward contains an operation that reads parameters
    skipped: tuple[SkippedLayer, ...] = ()  # the layers in it without an adapter
    trained: tuple[str, ...] = ()  # paths of the layers in it that are trained in full
    parameters: int = 0  # of these modules, or of the weights that an operation reads, without adapters
    shape: str = ""  # of the value, "1×64×56×56", if known
    dtype: str = ""  # of the value, "float32", if known


@dataclass(frozen=True)
class Scope:
    """A module with its contents."""

    path: str  # "" for the model
    name: str  # below the enclosing scope
    class_name: str
    eager: bool  # not traced; then its items are in the order of definition, without edges
    items: tuple[Item, ...]  # in topological order
    edges: tuple[Edge, ...] = ()
    ports: tuple[str, ...] = ()  # for each value from outside, the box or module that it comes from
    outputs: tuple[int, ...] = ()  # items with a value that is read outside
    count: int = 1  # number of identical neighbors that are drawn as this scope
    last: str = ""  # name of the last of these neighbors
    paths: tuple[str, ...] = ()  # of all modules that are drawn as this scope

    @property
    def marks(self) -> tuple[str, ...]:
        """The paths of all adapted layers inside, in order."""
        return tuple(mark for item in self.items for mark in item.marks)

    @property
    def skipped(self) -> tuple[SkippedLayer, ...]:
        """The layers inside without an adapter."""
        return tuple(dict.fromkeys(layer for item in self.items for layer in item.skipped))


Item: TypeAlias = Leaf | Scope


class Edge(NamedTuple):
    """An edge of a scope: item `target` reads, at its port `port`, a value of item `source < target`.

    A negative source is port `~source` of the scope.
    """

    source: int
    target: int
    port: int
    shape: str = ""  # of the value, "1×64×56×56", if known


def joined(leaves: Sequence[Leaf]) -> Leaf:
    """The first of several leaves, with the layers and parameters of all leaves."""
    return replace(
        leaves[0],
        marks=tuple(mark for leaf in leaves for mark in leaf.marks),
        paths=tuple(path for leaf in leaves for path in leaf.paths),
        skipped=tuple(dict.fromkeys(layer for leaf in leaves for layer in leaf.skipped)),
        trained=tuple(dict.fromkeys(path for leaf in leaves for path in leaf.trained)),
        parameters=sum(leaf.parameters for leaf in leaves),
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


def module_of(call: str) -> str:
    """The module of a place: the n-th call of a module has `@n` appended.

    >>> module_of("encoder.layer@2"), module_of("encoder.layer")
    ('encoder.layer', 'encoder.layer')
    """
    path, _, number = call.rpartition("@")
    return path if path and number.isdigit() else call


def span(item: Item) -> str:
    """The name of an item, or of the first and the last item that it represents.

    >>> span(Leaf("layer.0", "", "module", "call_module", "layer.0", (), count=6, last="layer.5"))
    'layer.0 … 5'
    """
    pairs = zip(item.name.split("."), (item.last or item.name).split("."), strict=True)
    return ".".join(first if first == last else f"{first} … {last}" for first, last in pairs)


def signature(item: Item, *, sizes: bool = True) -> Hashable:
    """The properties that two items must share to be drawn as one, without their own names, and maybe without sizes."""
    if isinstance(item, Leaf):
        detail = item.detail if sizes else item.detail.partition(" ")[0]
        own = (item.width, item.rank) if sizes else ()
        return (item.kind, detail, item.op, item.count, own, "" if item.kind != "op" else item.name)
    inner = tuple((stem(part.name), signature(part, sizes=sizes)) for part in item.items)
    return (
        item.class_name,
        item.eager,
        item.count,
        inner,
        tuple(dict.fromkeys(edge[:3] for edge in item.edges)),
        item.outputs,
    )


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
        return scope.eager or (bool(chain) and same)

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
    paths = tuple(path for scope in scopes for path in scope.paths)
    names = (tuple(dict.fromkeys(column)) for column in zip(*(scope.ports for scope in scopes), strict=True))
    ports = tuple(first if not others else f"{first.removesuffix(' …')} …" for first, *others in names)
    return replace(first, items=tuple(map(_overlay, columns)), paths=paths, ports=ports)
