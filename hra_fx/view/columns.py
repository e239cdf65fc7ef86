"""Where the boxes of a layered layout stand from left to right (in the manner of Brandes and Köpf 2002,
https://doi.org/10.1007/3-540-45848-4_3).

Nodes of neighbouring layers are aligned along edges that do not cross, so that chains become straight lines; such lines
move as a whole. They start midway between the leftmost and the rightmost places that the order allows, and are drawn
towards their neighbours as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import networkx as nx

GAP_X = 22.0
LANE = 14.0  # width of an edge's place among boxes
_SWEEPS = 16

#: (box, -1), or (source box, layer) for a lane of its outgoing edges.
Node: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Size:
    """A box to place: width, height, and where edges enter on top and leave below, measured from its middle."""

    width: float
    height: float
    enter: float = 0.0
    leave: float = 0.0


@dataclass(frozen=True)
class _Line:
    """Aligned nodes: the line's number, and how far right of the line the middle of this node is."""

    number: int
    shift: float


def columns(
    rows: Sequence[Sequence[Node]], graph: nx.DiGraph[Node], size: Callable[[Node], Size]
) -> dict[Node, float]:
    """x of the middle of every node.

    Args:
        rows: the layers, each from left to right.
        graph: edges between neighbouring layers.
        size: the size of a node.
    """
    lines = _lines(rows, graph, size)
    apart = _distances(rows, lines, size)
    x = _middle(apart, len({line.number for line in lines.values()}))
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
                low = max((x[left] + apart[left][number] for left in apart.pred[number]), default=wanted)
                high = min((x[right] - apart[number][right] for right in apart.succ[number]), default=wanted)
                x[number] = max(low, min(wanted, high))
    return {node: x[line.number] + line.shift for node, line in lines.items()}
