"""The vocabulary of a picture: leaves (what is drawn as one box) inside scopes (modules), as a tree of values.

A scope keeps its items in a topological order and the edges between them as index pairs, so that any run of neighbors
can be contracted without making a cycle: a path that left the run would have to come back to a later index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

LeafKind: TypeAlias = Literal["input", "output", "adapted_layer", "module", "op", "eager"]


@dataclass(frozen=True)
class Mark:
    """One adapted layer that a leaf stands for: its qualified name, and `|Q - I|_F` where that can be computed."""

    path: str
    rotation: float | None = None


@dataclass(frozen=True)
class Leaf:
    """One box: a node of a captured graph, or a module that stays Python.

    Attributes:
        name: what the box is called inside its module.
        detail: class and shape, or the parameters that an operation reads.
        kind: how it is drawn.
        op: the fx opcode; `"eager"` for a module outside every captured graph.
        target: the qualified name of the module, or the name of the function.
        place: the modules around it, outermost first, by qualified name; the n-th call of one module has `@n` appended.
        marks: the sites that the box stands for; empty for every call after the first of a shared layer.
        width: length `d` of the reflection vectors (sites only).
        rank: number of reflection vectors in use, adapters together (sites only).
        count: how many neighbors that look alike are drawn as this one.
        last: the name of the last of them.
        paths: the qualified names of the modules that the box stands for; empty for an operation.
        readers: the qualified names of the modules in whose forward an operation reads parameters.
        parameters: how many numbers these modules, or the weights that an operation reads, hold; no reflections.
        shape: that of the value, `"1×64×56×56"`, where it is known.
        dtype: that of the value, `"float32"`, where it is known.
    """

    name: str
    detail: str
    kind: LeafKind
    op: str
    target: str
    place: tuple[str, ...]
    marks: tuple[Mark, ...] = ()
    width: int = 0
    rank: int = 0
    count: int = 1
    last: str = ""
    paths: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    parameters: int = 0
    shape: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Scope:
    """A module with what happens inside it.

    Attributes:
        path: qualified name, `""` for the model.
        name: the name below the enclosing scope.
        class_name: its class.
        eager: whether its forward stays Python; its items then stand in the order of definition, without edges.
        items: leaves and scopes, in a topological order.
        edges: `(i, j)`, i < j: item j reads a value of item i.
        inputs: items that read a value from outside.
        outputs: items whose value is read outside.
        count: how many neighbors that look alike are drawn as this one.
        last: the name of the last of them.
        varied: whether they have different sizes (the first one's are shown).
    """

    path: str
    name: str
    class_name: str
    eager: bool
    items: tuple[Item, ...]
    edges: tuple[tuple[int, int], ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    count: int = 1
    last: str = ""
    varied: bool = False

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Every site inside, in order."""
        return tuple(mark for item in self.items for mark in item.marks)


Item: TypeAlias = Leaf | Scope


def contract(scope: Scope, runs: Sequence[range], combine: Callable[[Scope, range], Item]) -> Scope:
    """The scope with each run of neighboring items replaced by the one item that `combine` makes of it.

    Args:
        scope: the scope.
        runs: disjoint ranges of item indices.
        combine: called with the scope and a run.
    """
    head = {run[0]: run for run in runs}
    inside = {index for run in runs for index in run[1:]}
    items: list[Item] = []
    where: dict[int, int] = {}
    for index, item in enumerate(scope.items):
        if index in inside:
            where[index] = len(items) - 1
            continue
        where[index] = len(items)
        items.append(combine(scope, head[index]) if index in head else item)
    return replace(
        scope,
        items=tuple(items),
        edges=tuple(sorted({(where[i], where[j]) for i, j in scope.edges if where[i] != where[j]})),
        inputs=tuple(sorted({where[i] for i in scope.inputs})),
        outputs=tuple(sorted({where[i] for i in scope.outputs})),
    )


def cut(scope: Scope, run: range, name: str, class_name: str) -> Scope:
    """The items of a run as a scope of their own, with the edges between them and the ones that enter and leave."""
    first, stop = run[0], run[-1] + 1
    inner = tuple((i - first, j - first) for i, j in scope.edges if i in run and j in run)
    entering = {j - first for i, j in scope.edges if j in run and i not in run} | {
        i - first for i in scope.inputs if i in run
    }
    leaving = {i - first for i, j in scope.edges if i in run and j not in run} | {
        i - first for i in scope.outputs if i in run
    }
    return Scope(
        path=scope.path,
        name=name,
        class_name=class_name,
        eager=scope.eager,
        items=scope.items[first:stop],
        edges=inner,
        inputs=tuple(sorted(entering)),
        outputs=tuple(sorted(leaving)),
    )


def splice(scope: Scope, small: Callable[[Scope], bool], rename: Callable[[str, str], str]) -> Scope:
    """The opposite of `contract`: scopes that are `small` are replaced by their items.

    Args:
        scope: the scope.
        small: which scopes inside it; such a scope must have one input and one output, or edges would be made up.
        rename: the name of an item out of that of its scope and its own.
    """
    items: list[Item] = []
    edges: set[tuple[int, int]] = set()
    enter: list[int] = []
    leave: list[int] = []
    for item in scope.items:
        base = len(items)
        if isinstance(item, Scope) and small(item):
            items += [replace(part, name=rename(item.name, part.name)) for part in item.items]
            edges |= {(base + i, base + j) for i, j in item.edges}
            enter.append(base + item.inputs[0])
            leave.append(base + item.outputs[0])
        else:
            items.append(item)
            enter.append(base)
            leave.append(base)
    edges |= {(leave[i], enter[j]) for i, j in scope.edges}
    inputs = tuple(sorted({enter[i] for i in scope.inputs}))
    outputs = tuple(sorted({leave[i] for i in scope.outputs}))
    return replace(scope, items=tuple(items), edges=tuple(sorted(edges)), inputs=inputs, outputs=outputs)


def module_of(call: str) -> str:
    """The module of a place: the n-th call of a module has `@n` appended.

    >>> module_of("encoder.layer@2"), module_of("encoder.layer")
    ('encoder.layer', 'encoder.layer')
    """
    path, _, number = call.rpartition("@")
    return path if path and number.isdigit() else call


def span(item: Item) -> str:
    """The name of an item, or of the first and the last that it stands for.

    >>> span(Leaf("layer.0", "", "module", "call_module", "layer.0", (), count=6, last="layer.5"))
    'layer.0 … 5'
    """
    if not item.last or item.last == item.name:
        return item.name
    before = len(_common_start(item.name, item.last))
    first, last = item.name[before:], item.last[before:]
    after = len(_common_start(first[::-1], last[::-1]))
    return f"{item.name[: len(item.name) - after]} … {last}"


def _common_start(first: str, last: str) -> str:
    """What two names have in common at the start, up to the number in which they differ."""
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length].rstrip("0123456789")
