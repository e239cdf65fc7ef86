"""Convert the flat graph of leaves to the tree of scopes, by the calls of modules."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import networkx as nx

from hra_fx.errors import VisualizeError
from hra_fx.view.subject import name_of
from hra_fx.view.tree import Edge, Item, Leaf, Scope, contract, joined, merge_repeats, module_of

#: The names of several leaves in one box are listed up to this length.
_LETTERS_SHOWN = 28
#: Operations with a box of their own.
_LANDMARKS = frozenset({"scaled_dot_product_attention", "softmax", "matmul", "bmm", "baddbmm", "einsum"})
_Group: TypeAlias = "str | tuple[str, int]"  # a leaf's key, or a call's name and its depth


def scope_tree(picture: nx.DiGraph[str], title: str, focus: str = "") -> Scope:
    """Create the tree of a model from its leaves, with operations joined and identical neighbors merged.

    `focus` is the path of a module: then it is the tree of this module, of its first call.
    """
    nesting = _Nesting(picture)
    if not focus:
        return nesting.scope("", title, list(picture), 0)
    leaves: dict[str, Leaf] = dict(picture.nodes(data="leaf"))
    calls = [call for leaf in leaves.values() for call in leaf.place if module_of(call) == focus]
    keys = [key for key, leaf in leaves.items() if (calls[0] in leaf.place if calls else focus in leaf.paths)]
    if not keys:
        shown = {path for leaf in leaves.values() for path in (*leaf.paths, *map(module_of, leaf.place))}
        near = " or ".join(map(repr, difflib.get_close_matches(focus, sorted(shown), 3)))
        similar = f"; did you mean {near}?" if near else ". See model.named_modules()."
        raise VisualizeError(f"`focus`: the picture has no module {focus!r}{similar}")
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

        Args:
            call: the name of the call in the places of leaves.
            name: name of the scope.
            keys: the leaves inside, in order.
            depth: number of entries of their places that have already been processed.
        """
        path = module_of(call)
        groups, flow = self._acyclic_groups(keys, depth)
        ports = self._ports(keys)
        leaving = [key for key in keys if any(reader not in groups for reader in self.picture.succ[key])]
        leaves = ((group, self.leaf(group)) for group in flow if isinstance(group, str))
        small: set[_Group] = {group for group, leaf in leaves if leaf.kind == "op" and leaf.name not in _LANDMARKS}
        boxes = _join_operations(flow, small, {groups[key] for key in leaving})
        first = {group: index for index, group in enumerate(flow)}
        order = nx.lexicographical_topological_sort(_contracted(flow, boxes), key=first.__getitem__)
        members: dict[_Group, list[str]] = {group: [] for group in order}
        for key in keys:
            members[boxes[groups[key]]].append(key)
        place = {key: index for index, group in enumerate(members.values()) for key in group}
        scope = Scope(
            path=path,
            name=name,
            class_name=self.picture.graph["classes"].get(path, ""),
            eager=not self.picture.graph["traced"],
            items=tuple(self._item(group, inside, depth) for group, inside in members.items()),
            edges=self._edges(members, place, list(ports)),
            ports=tuple(ports.values()),
            outputs=tuple(sorted({place[key] for key in leaving})),
            paths=(path,) if path else (),
        )
        return merge_repeats(_join_eager(scope))

    def _ports(self, keys: list[str]) -> dict[str, str]:
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

    def _edges(
        self, members: Mapping[_Group, list[str]], place: Mapping[str, int], ports: list[str]
    ) -> tuple[Edge, ...]:
        """The edges between the items of a scope, and from its ports."""
        edges: set[Edge] = set()
        for group, keys in members.items():
            own = [] if isinstance(group, str) else list(self._ports(keys))
            for key in keys:
                for source, data in self.picture.pred[key].items():
                    if place.get(source) != place[key]:
                        start = place[source] if source in place else ~ports.index(source)
                        edges.add(Edge(start, place[key], own.index(source) if own else 0, data["shape"]))
        return tuple(sorted(edges))

    def _acyclic_groups(self, keys: list[str], depth: int) -> tuple[dict[str, _Group], nx.DiGraph[_Group]]:
        """Return the item of each leaf, and the flow between items.

        A module with calls that are interleaved with others is not one box, because contracting it would create a
        cycle. Its items are placed directly in this scope.
        """
        opened: set[_Group] = set()
        while True:
            groups = {key: self._group(key, depth, opened) for key in keys}
            flow: nx.DiGraph[_Group] = nx.DiGraph()
            flow.add_nodes_from(groups.values())
            for key, reader in self.picture.out_edges(keys):
                if reader in groups and groups[reader] != groups[key]:
                    flow.add_edge(groups[key], groups[reader])
            tangled = [part for part in nx.strongly_connected_components(flow) if len(part) > 1]
            if not tangled:
                return groups, flow
            opened |= {group for part in tangled for group in part if not isinstance(group, str)}

    def _group(self, key: str, depth: int, opened: set[_Group]) -> _Group:
        place = self.leaf(key).place
        while depth < len(place) and (place[depth], depth) in opened:
            depth += 1
        return (place[depth], depth) if depth < len(place) else key

    def _item(self, group: _Group, keys: list[str], depth: int) -> Item:
        if isinstance(group, tuple):
            call, level = group
            return _unwrap(self.scope(call, name_of(call), keys, level + 1))
        leaves = []
        for leaf in map(self.leaf, keys):
            tangled = [name_of(call) for call in leaf.place[depth:]]  # modules that are not drawn as one box
            leaves.append(replace(leaf, name=".".join([*tangled, leaf.name])))
        return _listing(leaves) if len(leaves) > 1 else leaves[0]


def _join_operations(flow: nx.DiGraph[_Group], small: set[_Group], leaving: set[_Group]) -> dict[_Group, _Group]:
    """Return for each group the one that represents its box. Contracting these boxes does not create a cycle.

    An operation that one box reads joins it, so that there is a box for each expression, such as the rotated query of
    an attention. Expressions with the same sources and readers are one box.

    Args:
        flow: acyclic flow between groups.
        small: the operations that may be joined.
        leaving: groups with a value that is read outside.

    >>> _join_operations(nx.DiGraph([("view", "transpose"), ("transpose", "layer")]), {"view", "transpose"}, set())
    {'view': 'transpose', 'transpose': 'transpose', 'layer': 'layer'}
    """
    boxes = {group: group for group in flow}
    for group in reversed(list(nx.topological_sort(flow))):
        readers = {boxes[reader] for reader in flow.succ[group]}
        if group in small and group not in leaving and len(readers) == 1 and readers <= small:
            boxes[group] = readers.pop()
    joined_flow = _contracted(flow, boxes)
    ends = {box: (frozenset(joined_flow.pred[box]), frozenset(joined_flow.succ[box])) for box in joined_flow}
    first: dict[object, _Group] = {}
    twins = {box: first.setdefault(around, box) for box, around in ends.items() if box in small and around[1]}
    return {group: twins.get(box, box) for group, box in boxes.items()}


def _contracted(flow: nx.DiGraph[_Group], boxes: Mapping[_Group, _Group]) -> nx.DiGraph[_Group]:
    """The flow between boxes."""
    found: nx.DiGraph[_Group] = nx.DiGraph()
    found.add_nodes_from(boxes[group] for group in flow)
    found.add_edges_from((boxes[a], boxes[b]) for a, b in flow.edges if boxes[a] != boxes[b])
    return found


def _join_eager(scope: Scope) -> Scope:
    """Join neighbors that are not traced."""

    def follows(index: int) -> bool:
        return all(isinstance(item, Leaf) and item.kind == "eager" for item in scope.items[index - 1 : index + 1])

    return contract(scope, follows, _listing)


def _listing(items: Sequence[Item]) -> Leaf:
    """Create one leaf with the names of several leaves."""
    leaves = [item for item in items if isinstance(item, Leaf)]
    names, details = [leaf.name for leaf in leaves], [leaf.detail for leaf in leaves]
    shown = names[0]
    for index, name in enumerate(names[1:], start=1):
        if len(shown) + len(name) > _LETTERS_SHOWN:
            shown += f" + {len(names) - index}"
            break
        shown += f", {name}"
    return replace(
        joined(leaves),
        name=shown,
        detail=f"{len(names)} modules" if leaves[0].kind == "eager" else ", ".join(filter(None, details)),
        target=", ".join(names),
        shape=leaves[-1].shape,
        dtype=leaves[-1].dtype,
    )


def _unwrap(scope: Scope) -> Item:
    """Draw a scope with one item as the item with both names, or as a module if the item is its whole forward."""
    if len(scope.items) != 1:
        return scope
    item = scope.items[0]
    if isinstance(item, Leaf) and item.kind == "op":
        path, kind = scope.path, scope.class_name
        return replace(item, name=scope.name, detail=kind, kind="module", target=path, paths=(path,))
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
