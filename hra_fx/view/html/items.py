"""The tree of scopes as a list of records: every box before those inside it, with the index of its parent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hra_fx.view.html.packing import Texts
from hra_fx.view.layering import Layering
from hra_fx.view.tree import Item, Leaf, Scope, span

#: What a layering depends on: the number of boxes, and their edges.
_Flow: TypeAlias = "tuple[int, tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]"


@dataclass
class Items:
    """The boxes of a tree.

    Attributes:
        texts: collects the texts; records have their indices.
        records: one for each box; the first is the root. Values that are 0, empty or false are left out.
        layerings: the distinct layerings; records have their indices, from 1.
        holders: path of a module -> the record of the box that stands for it.
        scopes: path of a module -> the record of the box that shows its inside.
    """

    texts: Texts
    records: list[dict[str, Any]] = field(default_factory=list)
    layerings: list[dict[str, Any]] = field(default_factory=list)
    holders: dict[str, int] = field(default_factory=dict)
    scopes: dict[str, int] = field(default_factory=dict)
    _flows: dict[_Flow, int] = field(default_factory=dict)

    def add(self, item: Item, parent: int = 0, around: Sequence[str] = ("",)) -> None:
        """Add a box and everything inside it.

        Args:
            item: the box.
            parent: the record of the scope around it.
            around: the modules that the scope around it stands for.
        """
        index = len(self.records)
        if isinstance(item, Leaf):
            self.records.append({"parent": parent, **self._leaf(item)})
            for path in item.paths:
                self.holders.setdefault(path, index)
            return
        paths = instances(item, around)
        self.records.append({"parent": parent, **self._scope(item, paths)})
        for path in paths:
            self.scopes.setdefault(path, index)
        for part in item.items:
            self.add(part, index, paths)

    def _leaf(self, leaf: Leaf) -> dict[str, Any]:
        marks = tuple(mark.path for mark in leaf.marks)
        text = self.texts.number
        record = {
            "label": text(span(leaf)),
            "kind": text(leaf.kind),
            "detail": text(leaf.detail),
            "op": text(leaf.op),
            "target": text(leaf.target),
            "shape": text(leaf.shape),
            "dtype": text(leaf.dtype),
            "marks": self.texts.numbers(marks),
            "paths": self.texts.numbers(leaf.paths) if leaf.paths != marks else [],
            "width": leaf.width,
            "rank": leaf.rank,
            "parameters": leaf.parameters,
            "count": leaf.count - 1,
        }
        return {name: value for name, value in record.items() if value}

    def _scope(self, scope: Scope, paths: Sequence[str]) -> dict[str, Any]:
        text = self.texts.number
        record = {
            "label": text(span(scope)),
            "kind": text("untraced" if scope.eager else "traced"),
            "detail": text(scope.class_name),
            "target": text(scope.path),
            "paths": self.texts.numbers(paths) if len(paths) > 1 else [],
            "count": scope.count - 1,
            "varied": int(scope.varied),
            "layering": 0 if scope.eager else self._layering(scope),
        }
        return {name: value for name, value in record.items() if value}

    def _layering(self, scope: Scope) -> int:
        flow = (len(scope.items), scope.edges, scope.inputs, scope.outputs)
        if flow not in self._flows:
            layers = Layering(*flow)
            self.layerings.append(
                {
                    "edges": [end for edge in scope.edges for end in edge],
                    "inputs": scope.inputs,
                    "outputs": scope.outputs,
                    # A box, a border or a lane as one number.
                    "rows": [[2 * (box + 2) + (lane >= 0) for box, lane in row] for row in layers.rows],
                }
            )
            self._flows[flow] = len(self.layerings)
        return self._flows[flow]


def instances(scope: Scope, around: Sequence[str]) -> Sequence[str]:
    """The paths of all modules that a scope stands for; only the first if the others are not known.

    They are derived from the paths of the leaves inside, or else from the modules around.

    Args:
        scope: the scope.
        around: the modules that the scope around it stands for.
    """
    times = len(around) * scope.count
    for leaf in _leaves(scope) if times > 1 else ():
        each, rest = divmod(len(leaf.paths), times)
        if not each or rest or not leaf.paths[0].startswith(scope.path + "."):
            continue
        inner = leaf.paths[0][len(scope.path) :]
        firsts = leaf.paths[::each]
        if all(path.endswith(inner) for path in firsts):
            return tuple(path[: -len(inner)] for path in firsts)
    if scope.count == 1 and scope.path.startswith(around[0]):
        return tuple(path + scope.path[len(around[0]) :] for path in around)
    return (scope.path,)


def _leaves(scope: Scope) -> Iterator[Leaf]:
    for item in scope.items:
        if isinstance(item, Leaf):
            yield item
        else:
            yield from _leaves(item)
