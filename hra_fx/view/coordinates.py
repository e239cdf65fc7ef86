"""x coordinates of the boxes of a layered layout.

Lines of aligned nodes move as a whole. They start midway between the leftmost and rightmost positions that the order
allows, and then move towards their neighbors as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import networkx as nx

from hra_fx.view.layering import Layering, Node

GAP_X = 22.0
LANE = 14.0  # width of an edge among boxes
_SWEEPS = 16


@dataclass(frozen=True)
class Size:
    """A box to place: width, height, and where edges enter (top) and leave (bottom), relative to its middle."""

    width: float
    height: float
    enter: float = 0.0
    leave: float = 0.0


@dataclass(frozen=True)
class _Line:
    """A line of aligned nodes: its number, and the offset of the middle of this node."""

    number: int
    shift: float


def x_coordinates(layers: Layering, size: Callable[[Node], Size]) -> dict[Node, float]:
    """x of the middle of every node.

    Args:
        layers: the layers and their order.
        size: the size of a node.
    """
    lines = _lines(layers, size)
    apart = _distances(layers.rows, lines, size)
    x = _middle(apart)
    pulls: dict[int, list[tuple[int, float]]] = {number: [] for number in x}
    for upper, lower in layers.graph.edges:
        above, below = lines[upper], lines[lower]
        if above.number != below.number:
            bend = above.shift + size(upper).leave - below.shift - size(lower).enter
            pulls[above.number].append((below.number, -bend))
            pulls[below.number].append((above.number, bend))
    for sweep in range(_SWEEPS):
        for number in sorted(x, reverse=sweep % 2 == 1):
            if pulls[number]:
                wanted = sum(x[other] + bend for other, bend in pulls[number]) / len(pulls[number])
                low = max((x[left] + apart[left][number]["gap"] for left in apart.pred[number]), default=-inf)
                high = min((x[right] - apart[number][right]["gap"] for right in apart.succ[number]), default=inf)
                x[number] = max(low, min(wanted, high))
    return {node: x[line.number] + line.shift for node, line in lines.items()}


def _lines(layers: Layering, size: Callable[[Node], Size]) -> dict[Node, _Line]:
    """Lines of aligned nodes."""
    lines: dict[Node, _Line] = {}
    count = 0
    for node in (node for row in layers.rows for node in row):
        if node in layers.over:
            upper = layers.over[node]
            shift = lines[upper].shift + size(upper).leave - size(node).enter
            lines[node] = _Line(lines[upper].number, shift)
        else:
            lines[node] = _Line(count, 0.0)
            count += 1
    return lines


def _distances(
    rows: Sequence[Sequence[Node]], lines: dict[Node, _Line], size: Callable[[Node], Size]
) -> nx.DiGraph[int]:
    """The minimum distance of two lines, from the nodes that are side by side."""
    apart: nx.DiGraph[int] = nx.DiGraph()
    apart.add_nodes_from(range(len({line.number for line in lines.values()})))
    for row in rows:
        for left, right in pairwise(row):
            space = GAP_X if left[1] < 0 and right[1] < 0 else GAP_X / 2
            a, b = lines[left], lines[right]
            gap = (size(left).width + size(right).width) / 2 + space + a.shift - b.shift
            known = apart.get_edge_data(a.number, b.number, {"gap": gap})["gap"]
            apart.add_edge(a.number, b.number, gap=max(gap, known))
    return apart


def _middle(apart: nx.DiGraph[int]) -> dict[int, float]:
    """Midway between the leftmost and rightmost positions. Both keep the distances, so their mean does too."""
    order = list(nx.lexicographical_topological_sort(apart))
    left: dict[int, float] = {}
    for number in order:
        left[number] = max((left[other] + apart[other][number]["gap"] for other in apart.pred[number]), default=0.0)
    most = max(left.values(), default=0.0)
    right: dict[int, float] = {}
    for number in reversed(order):
        right[number] = min((right[other] - apart[number][other]["gap"] for other in apart.succ[number]), default=most)
    return {number: (left[number] + right[number]) / 2 for number in sorted(order)}
