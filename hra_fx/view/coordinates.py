"""x coordinates of the boxes of a layered layout (similar to Brandes and Köpf 2002,
https://doi.org/10.1007/3-540-45848-4_3).

Nodes of adjacent layers are aligned along edges that do not cross, so that chains become straight lines. Such lines
move as a whole. They start midway between the leftmost and rightmost positions that the order allows, and then move
towards their neighbors as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import TypeAlias

import networkx as nx

GAP_X = 22.0
LANE = 14.0  # width of an edge among boxes
_SWEEPS = 16

#: (box, -1), or (source box, layer) for a lane of its outgoing edges.
Node: TypeAlias = tuple[int, int]


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


def x_coordinates(
    rows: Sequence[Sequence[Node]], graph: nx.DiGraph[Node], size: Callable[[Node], Size]
) -> dict[Node, float]:
    """x of the middle of every node.

    Args:
        rows: the layers, each from left to right.
        graph: edges between adjacent layers.
        size: the size of a node.
    """
    lines = _lines(rows, graph, size)
    apart = _distances(rows, lines, size)
    x = _middle(apart)
    pulls: dict[int, list[tuple[int, float]]] = {number: [] for number in x}
    for upper, lower in graph.edges:
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


def _lines(rows: Sequence[Sequence[Node]], graph: nx.DiGraph[Node], size: Callable[[Node], Size]) -> dict[Node, _Line]:
    """Align every node with at most one node above it: boxes with boxes first, then lanes with lanes, longest paths
    first."""
    above: dict[Node, int] = {}
    below: dict[Node, int] = {}
    for row in rows:
        above.update((node, max((above[source] + 1 for source in graph.pred[node]), default=0)) for node in row)
    for row in reversed(rows):
        below.update((node, max((below[reader] + 1 for reader in graph.succ[node]), default=0)) for node in row)
    length = {(upper, node): above[upper] + below[node] for upper, node in graph.edges}
    lines: dict[Node, _Line] = {}
    count = 0
    for upper_row, row in zip([[], *rows[:-1]], rows, strict=True):
        partner = _partners(upper_row, row, graph, length)
        for node in row:
            if node in partner:
                over = lines[partner[node]]
                shift = over.shift + size(partner[node]).leave - size(node).enter
                lines[node] = _Line(over.number, shift)
            else:
                lines[node] = _Line(count, 0.0)
                count += 1
    return lines


def _partners(
    upper_row: Sequence[Node], row: Sequence[Node], graph: nx.DiGraph[Node], length: dict[tuple[Node, Node], int]
) -> dict[Node, Node]:
    """Node -> the node above to align with. No two of these edges cross or meet."""
    upper_place = {node: index for index, node in enumerate(upper_row)}
    place = {node: index for index, node in enumerate(row)}
    edges = [(upper, node) for node in row for upper in graph.pred[node]]
    edges.sort(key=lambda edge: (_kind(*edge), -length[edge], place[edge[1]], upper_place[edge[0]]))
    chosen: list[tuple[int, int]] = []
    partner: dict[Node, Node] = {}
    for upper, node in edges:
        here = (upper_place[upper], place[node])
        if all((here[0] - a) * (here[1] - b) > 0 for a, b in chosen):
            chosen.append(here)
            partner[node] = upper
    return partner


def _kind(upper: Node, lower: Node) -> int:
    """The order of alignment: boxes with boxes, then lanes with lanes, then the ends of lanes."""
    is_lane = (upper[1] >= 0, lower[1] >= 0)
    return {(False, False): 0, (True, True): 1}.get(is_lane, 2)


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
