"""Join the operations of a module to few boxes, so that the module stays readable.

An operation that one box reads joins it, so that there is a box for each expression, such as the rotated query of an
attention. Expressions with the same sources and readers are one box. If there are still many, neighbors are joined.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import TypeVar

import networkx as nx

#: A module with more expressions than this shows neighbors as one box.
EXPRESSIONS = 12
Group = TypeVar("Group", bound=Hashable)


def join_operations(flow: nx.DiGraph[Group], small: set[Group], leaving: set[Group]) -> dict[Group, Group]:
    """Return for each group the one that represents its box. Contracting these boxes does not create a cycle.

    Args:
        flow: acyclic flow between groups.
        small: the operations that may be joined.
        leaving: groups with a value that is read outside.

    >>> join_operations(nx.DiGraph([("view", "transpose"), ("transpose", "layer")]), {"view", "transpose"}, set())
    {'view': 'transpose', 'transpose': 'transpose', 'layer': 'layer'}
    """
    boxes = {group: group for group in flow}
    if len(small) < 2:
        return boxes
    for group in reversed(list(nx.topological_sort(flow))):
        readers = {boxes[reader] for reader in flow.succ[group]}
        if group in small and group not in leaving and len(readers) == 1 and readers <= small:
            boxes[group] = readers.pop()
    twins = _twins(contracted(flow, boxes), small)
    boxes = {group: twins.get(box, box) for group, box in boxes.items()}
    if len({boxes[group] for group in small}) > EXPRESSIONS:
        runs = _runs(contracted(flow, boxes), small)
        boxes = {group: runs[box] for group, box in boxes.items()}
    return boxes


def contracted(flow: nx.DiGraph[Group], boxes: Mapping[Group, Group]) -> nx.DiGraph[Group]:
    """The flow between boxes."""
    joined: nx.DiGraph[Group] = nx.DiGraph()
    joined.add_nodes_from(boxes[group] for group in flow)
    joined.add_edges_from((boxes[a], boxes[b]) for a, b in flow.edges if boxes[a] != boxes[b])
    return joined


def in_order(flow: nx.DiGraph[Group]) -> list[Group]:
    """The groups in topological order, with as few changes of their order as possible."""
    first = {group: index for index, group in enumerate(flow)}
    return list(nx.lexicographical_topological_sort(flow, key=first.__getitem__))


def _twins(flow: nx.DiGraph[Group], small: set[Group]) -> dict[Group, Group]:
    """Join operations with the same sources and the same readers."""
    first: dict[object, Group] = {}
    ends = {group: (frozenset(flow.pred[group]), frozenset(flow.succ[group])) for group in flow if group in small}
    return {group: first.setdefault(around, group) for group, around in ends.items() if around[1]}


def _runs(flow: nx.DiGraph[Group], small: set[Group]) -> dict[Group, Group]:
    """Join operations that are neighbors in topological order."""
    order: list[Group] = in_order(flow)
    boxes = {order[0]: order[0]}
    for before, group in pairwise(order):
        boxes[group] = boxes[before] if {before, group} <= small else group
    return boxes
