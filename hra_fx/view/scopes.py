"""Convert the flat graph of leaves to the tree of scopes, by the calls of modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import networkx as nx

from hra_fx.view.subject import name_of
from hra_fx.view.tree import Item, Leaf, Scope, contract, joined, merge_repeats, module_of, prefixes

#: The names of several leaves in one box are listed up to this length.
_LETTERS_SHOWN = 28
#: A module with many operations shows them in groups, except for these.
_OPERATIONS_SHOWN = 5
_LANDMARKS = frozenset({"scaled_dot_product_attention", "softmax", "matmul", "bmm", "baddbmm", "einsum"})
_Group: TypeAlias = "str | tuple[str, int]"  # a leaf's key, or a call's name and its depth


def scope_tree(picture: nx.DiGraph[str], title: str) -> Scope:
    """Create the tree of a model from its leaves, with operations joined and identical neighbors merged."""
    return _Nesting(picture).scope("", title, list(picture), 0)


@dataclass
class _Nesting:
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
        entering, leaving, keys = self._ports(path, keys)
        groups, flow = self._acyclic_groups(keys, depth)
        members: dict[_Group, list[str]] = {group: [] for group in flow}
        for key in keys:
            members[groups[key]].append(key)
        first = {group: index for index, group in enumerate(flow)}
        order = list(nx.lexicographical_topological_sort(flow, key=first.__getitem__))
        place = {group: index for index, group in enumerate(order)}
        scope = Scope(
            path=path,
            name=name,
            class_name=self.picture.graph["classes"].get(path, ""),
            eager=self.picture.graph["traced"].isdisjoint(["", *prefixes(path)]),
            items=tuple(self._item(group, members[group], depth) for group in order),
            edges=tuple(sorted((place[a], place[b]) for a, b in flow.edges)),
            inputs=tuple(sorted({place[groups[key]] for key in entering})),
            outputs=tuple(sorted({place[groups[key]] for key in leaving})),
            paths=(path,) if path else (),
        )
        return merge_repeats(_gather(scope))

    def _ports(self, path: str, keys: list[str]) -> tuple[set[str], set[str], list[str]]:
        """Leaves that read from outside, leaves that are read outside, and all leaves except ports.

        Ports are the output of a traced module in a model, and its input if there is only one. The
        border of the module shows them.
        """
        inside = set(keys)
        entering = {key for key in keys if any(source not in inside for source in self.picture.pred[key])}
        leaving = {key for key in keys if any(reader not in inside for reader in self.picture.succ[key])}
        if not path or path not in self.picture.graph["traced"]:
            return entering, leaving, keys
        inputs = [key for key in keys if self.leaf(key).kind == "input"]
        outputs = [key for key in keys if self.leaf(key).kind == "output"]
        border = set(outputs) | (set(inputs) if len(inputs) == 1 else set())
        if len(border) == len(keys):
            return entering, leaving, keys
        entering |= {reader for key in border & set(inputs) for reader in self.picture.succ[key]}
        leaving |= {source for key in outputs for source in self.picture.pred[key]}
        return entering - border, leaving - border, [key for key in keys if key not in border]

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
        if isinstance(group, str):
            leaf = self.leaf(group)
            tangled = [name_of(call) for call in leaf.place[depth:]]  # modules that are not drawn as one box
            return replace(leaf, name=".".join([*tangled, leaf.name]))
        call, level = group
        return _unwrap(self.scope(call, name_of(call), keys, level + 1), self.picture.graph["details"])


def _is_small(item: Item) -> bool:
    return isinstance(item, Leaf) and item.kind == "op" and item.name not in _LANDMARKS


def _gather(scope: Scope) -> Scope:
    """Join neighbors: modules that are not traced, operations in a chain, and all operations if there are still many.

    The items are in topological order, so joining neighbors does not create a cycle.
    """
    edges = set(scope.edges)
    readers = Counter([*(i for i, _ in edges), *scope.outputs])
    sources = Counter([*(j for _, j in edges), *scope.inputs])

    def follows(index: int) -> bool:
        pair = scope.items[index - 1 : index + 1]
        if all(map(_is_small, pair)):
            return (index - 1, index) in edges and readers[index - 1] == sources[index] == 1
        return all(isinstance(item, Leaf) and item.kind == "eager" for item in pair)

    joined_chains = contract(scope, follows, _listing)
    items = joined_chains.items
    if sum(map(_is_small, items)) <= _OPERATIONS_SHOWN:
        return joined_chains
    return contract(joined_chains, lambda index: all(map(_is_small, items[index - 1 : index + 1])), _listing)


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


def _unwrap(scope: Scope, details: Mapping[str, str]) -> Item:
    """Draw a scope with one item as the item with both names, or as a module if the item is its whole forward."""
    if len(scope.items) != 1:
        return scope
    item = scope.items[0]
    if isinstance(item, Leaf) and item.kind == "op":
        detail = details.get(scope.path, scope.class_name)
        return replace(item, name=scope.name, detail=detail, kind="module", target=scope.path, paths=(scope.path,))
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
