"""Convert the flat graph of leaves to the tree of scopes, by the calls of modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import networkx as nx

from hra_fx.errors import VisualizeError
from hra_fx.view.tree import Edge, Item, Leaf, Scope, joined, merge_repeats, module_of, name_of

#: The names of several leaves in one box are listed up to this length.
_LETTERS_SHOWN = 28
#: Operations with a box of their own.
_LANDMARKS = frozenset({"scaled_dot_product_attention", "softmax", "matmul", "bmm", "baddbmm", "einsum"})
#: The readers outside of a scope, in the flow between its groups.
_OUTSIDE = -1


def scope_tree(picture: nx.DiGraph[str], title: str, focus: str = "") -> Scope:
    """Create the tree of a model from its leaves, with operations joined and identical neighbors merged.

    `focus` is the path of a module: then it is the tree of this module, of its first call.
    """
    nesting = _Nesting(picture)
    if not focus:
        return nesting.scope("", title, list(picture), 0)
    leaves: dict[str, Leaf] = dict(picture.nodes(data="leaf"))
    calls = [call for leaf in leaves.values() for call in leaf.place if module_of(call) == focus]
    keys = [key for key, leaf in leaves.items() if (calls[0] in leaf.place if calls else focus == leaf.target)]
    if not keys:
        raise VisualizeError(f"`focus`: the picture has no module {focus!r}. See model.named_modules().")
    place = leaves[keys[0]].place
    return nesting.scope(focus, focus, keys, place.index(calls[0]) + 1 if calls else len(place))


@dataclass
class _Nesting:
    """Creates the scopes of a graph of leaves, from the inside out."""

    picture: nx.DiGraph[str]

    def leaf(self, key: str) -> Leaf:
        leaf: Leaf = self.picture.nodes[key]["leaf"]
        return leaf

    def scope(self, call: str, name: str, keys: list[str], depth: int) -> Scope:
        """Create the scope of one call of a module.

        Neighbors in the same call are one item, so no cycle arises. A module whose call is interrupted by other modules
        is several items.

        Args:
            call: the name of the call in the places of leaves.
            name: name of the scope.
            keys: the leaves inside, in order.
            depth: number of entries of their places that have already been processed.
        """
        path = module_of(call)
        runs = groupby(keys, key=lambda key: self.leaf(key).place[depth : depth + 1] or key)
        groups = self._join_operations([list(run) for _, run in runs], depth)
        place = {key: index for index, group in enumerate(groups) for key in group}
        ports = self._ports(keys)
        leaving = {place[key] for key in keys if any(reader not in place for reader in self.picture.succ[key])}
        scope = Scope(
            path=path,
            name=name,
            class_name=self.picture.graph["classes"].get(path, ""),
            is_traced=self.picture.graph["traced"],
            items=tuple(self._item(group, depth) for group in groups),
            edges=self._edges(groups, place, list(ports)),
            ports=tuple(ports.values()),
            outputs=tuple(sorted(leaving)),
        )
        return merge_repeats(scope)

    def _ports(self, keys: Collection[str]) -> dict[str, str]:
        """The leaves outside with values that some leaves read, in the order in which they are read.

        Each has the name of its port: the outermost call around it that is not around the reader, or its own name.
        """
        inside, ports = set(keys), dict[str, str]()
        for key in keys:
            around = self.leaf(key).place
            for source in self.picture.pred[key]:
                if source not in inside and source not in ports:
                    calls = self.leaf(source).place
                    outer = (call for at, call in enumerate(calls) if call not in around[at : at + 1])
                    ports[source] = next(map(name_of, outer), self.leaf(source).name)
        return ports

    def _edges(self, groups: list[list[str]], place: dict[str, int], ports: list[str]) -> tuple[Edge, ...]:
        """The edges between the items of a scope, and from its ports."""
        edges: set[Edge] = set()
        for target, keys in enumerate(groups):
            own = list(self._ports(keys))
            for key in keys:
                for source, data in self.picture.pred[key].items():
                    if place.get(source) != target:
                        start = place[source] if source in place else ~ports.index(source)
                        edges.add(Edge(start, target, own.index(source), data["shape"]))
        return tuple(sorted(edges))

    def _join_operations(self, groups: list[list[str]], depth: int) -> list[list[str]]:
        """Join groups of leaves so that there is a box for each expression, such as the rotated query of an attention.

        An operation that one other operation reads joins it, at the place of the reader, which is the later one.
        Expressions with the same sources and readers are also joined.
        """
        place = {key: index for index, group in enumerate(groups) for key in group}
        edges = {(place[a], place.get(b, _OUTSIDE)) for a, b in self.picture.out_edges(place)}
        flow: nx.DiGraph[int] = nx.DiGraph((a, b) for a, b in edges if a != b)
        flow.add_nodes_from(range(len(groups)))
        leaves = enumerate(self.leaf(group[0]) for group in groups)
        small = {index for index, leaf in leaves if leaf.kind == "op" and leaf.name not in _LANDMARKS}
        small -= {index for index, group in enumerate(groups) if len(self.leaf(group[0]).place) > depth}
        boxes = {_OUTSIDE: _OUTSIDE}  # group -> the one that it joins
        for index in reversed(range(len(groups))):
            readers = {boxes[reader] for reader in flow.succ[index]}
            boxes[index] = readers.pop() if index in small and len(readers) == 1 and readers <= small else index
        joined_flow = nx.relabel_nodes(flow, boxes)
        joined_flow.remove_edges_from(list(nx.selfloop_edges(joined_flow)))
        first: dict[object, int] = {}
        for index in sorted(small & {*boxes.values()}):
            around = frozenset(joined_flow.pred[index]), frozenset(joined_flow.succ[index])
            boxes[index] = first.setdefault(around, index)
        members: dict[int, list[str]] = {}
        for index, group in enumerate(groups):
            members.setdefault(boxes[boxes[index]], []).extend(group)
        return [members[box] for box in sorted(members)]

    def _item(self, group: list[str], depth: int) -> Item:
        leaves = [self.leaf(key) for key in group]
        if len(leaves[0].place) > depth:
            call = leaves[0].place[depth]
            return _unwrap(self.scope(call, name_of(call), group, depth + 1))
        return _listing(leaves) if len(leaves) > 1 else leaves[0]


def _listing(leaves: Sequence[Leaf]) -> Leaf:
    """Create one leaf with the names of several operations."""
    names, details = [leaf.name for leaf in leaves], dict.fromkeys(leaf.detail for leaf in leaves if leaf.detail)
    shown = names[0]
    for index, name in enumerate(names[1:], start=1):
        if len(shown) + len(name) > _LETTERS_SHOWN:
            shown += f" + {len(names) - index}"
            break
        shown += f", {name}"
    last = leaves[-1].shape
    return replace(joined(leaves), name=shown, detail=", ".join(details), target=", ".join(names), shape=last)


def _unwrap(scope: Scope) -> Item:
    """Draw a scope with one item as the item with both names, or as a module if the item is its whole forward."""
    if len(scope.items) != 1:
        return scope
    item = scope.items[0]
    if isinstance(item, Leaf) and item.kind == "op":
        return replace(item, name=scope.name, detail=scope.class_name, kind="module", target=scope.path)
    return replace(item, name=_below(scope.name, item.name), last=item.last and _below(scope.name, item.last))


def _below(outer: str, inner: str) -> str:
    """Join two names. The inner name may repeat the last part of the outer name.

    >>> _below("blocks", "blocks.0"), _below("encoder", "layer.0")
    ('blocks.0', 'encoder.layer.0')
    """
    parts = outer.split(".")
    if inner.split(".")[0] == parts[-1]:
        parts.pop()
    return ".".join([*parts, inner])
