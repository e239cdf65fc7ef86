"""Layout: the positions of sized boxes in rows from top to bottom.

An edge to the next row is a curve between the rows. A longer edge passes the rows between on one side, so that no edge
crosses a box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from hra_fx.view.tree import Edge, Scope

GAP_X, GAP_Y = 22.0, 24.0
LANE = 14.0  # distance of long edges from boxes and from each other
PER_ROW = 5


@dataclass(frozen=True)
class Size:
    """A box to place: width, height, and where edges enter (top, for each port) and leave, relative to its center."""

    width: float
    height: float
    enter: tuple[float, ...] = (0.0,)
    leave: float = 0.0

    def entry(self, port: int) -> float:
        """Where an edge enters. A box that is not open has one entry for all ports."""
        return self.enter[min(port, len(self.enter) - 1)]


@dataclass(frozen=True)
class Route:
    """An edge: vertical segments `(x, from y, to y)` from top to bottom, joined by curves in the gaps between rows."""

    edge: Edge
    pieces: tuple[tuple[float, float, float], ...]


def rows_of(scope: Scope) -> list[int]:
    """The row of every item: below its sources, with a limited width. If edges are unknown, modules are one per row.

    An item without sources is right above its readers. The items are in topological order.
    """
    count, filled = len(scope.items), Counter[int]()
    graph: nx.DiGraph[int] = nx.DiGraph((edge.source, edge.target) for edge in scope.edges)
    graph.add_nodes_from(range(count))
    rows: list[int] = []
    for box, item in enumerate(scope.items):
        low = max((rows[source] + 1 for source in graph.pred[box] if source >= 0), default=0)
        if not scope.is_traced and rows:
            low = rows[-1] + any(isinstance(one, Scope) for one in (item, scope.items[box - 1]))
        while filled[low] >= PER_ROW:
            low += 1
        rows.append(low)
        filled[low] += 1
    for box in reversed(range(count)):
        if not graph.pred[box]:
            rows[box] = max(rows[box], min((rows[reader] for reader in graph.succ[box]), default=0) - 1)
    return rows


class Layout:
    """Boxes in given rows, in which every edge points down.

    Attributes:
        width: of all boxes and edges.
        height: of all rows.
        x: the center of each box.
        top: the upper edge of each box, which is vertically centered in its row.
        routes: the edges.
    """

    def __init__(self, sizes: Sequence[Size], edges: Sequence[Edge], rows: Sequence[int]) -> None:
        """Place all boxes."""
        self.sizes, self.edges, self.row = sizes, edges, rows
        self.rows = [[box for box, own in enumerate(rows) if own == row] for row in range(max(rows) + 1)]
        self.x = [0.0] * len(sizes)
        for boxes in self.rows:
            self._place(boxes)
        heights = [max((sizes[box].height for box in boxes), default=0.0) for boxes in self.rows]
        self.tops = [sum(heights[:row]) + row * GAP_Y for row in range(len(heights))]
        self.bottoms = [top + height for top, height in zip(self.tops, heights, strict=True)]
        self.top = [
            (self.tops[row] + self.bottoms[row] - size.height) / 2 for row, size in zip(rows, sizes, strict=True)
        ]
        lanes = self._lanes()
        left = min([*map(self._left, range(len(sizes))), *(x - 1 for x in lanes.values())])
        self.x, self.lanes = [x - left for x in self.x], {edge: x - left for edge, x in lanes.items()}
        self.width = max([*map(self._right, range(len(sizes))), *(x + 1 for x in self.lanes.values())])
        self.height = self.bottoms[-1]
        self.routes = tuple(Route(edge, self._pieces(edge)) for edge in edges)

    def _left(self, box: int) -> float:
        return self.x[box] - self.sizes[box].width / 2

    def _right(self, box: int) -> float:
        return self.x[box] + self.sizes[box].width / 2

    def _start(self, edge: Edge) -> float:
        return self.x[edge.source] + self.sizes[edge.source].leave

    def _end(self, edge: Edge) -> float:
        return self.x[edge.target] + self.sizes[edge.target].entry(edge.port)

    def _place(self, boxes: list[int]) -> None:
        """Place a row: each box where edges from the row above are straight, with gaps, and balanced sides."""
        wanted = {}
        for box in boxes:
            above = [edge for edge in self.edges if edge.target == box and self.row[edge.source] == self.row[box] - 1]
            straight = [self._start(edge) - self.sizes[box].entry(edge.port) for edge in above]
            wanted[box] = sum(straight) / max(len(straight), 1)
        boxes.sort(key=lambda box: (wanted[box], box))
        free = float("-inf")
        for box in boxes:
            half = self.sizes[box].width / 2
            self.x[box] = max(wanted[box], free + half)
            free = self.x[box] + half + GAP_X
        shift = sum(wanted[box] - self.x[box] for box in boxes) / max(len(boxes), 1)
        for box in boxes:
            self.x[box] += shift

    def _lanes(self) -> dict[Edge, float]:
        """The x of each long edge beside the rows that it passes, on the side with the shorter way.

        Shorter edges are closer to the boxes.
        """
        passed = {edge: range(self.row[edge.source] + 1, self.row[edge.target]) for edge in self.edges}
        lanes: dict[Edge, float] = {}
        for edge in sorted(filter(passed.__getitem__, passed), key=lambda edge: (len(passed[edge]), edge)):
            boxes = [box for row in passed[edge] for box in self.rows[row]]
            others = [x for other, x in lanes.items() if set(passed[edge]) & set(passed[other])]
            right = max([*map(self._right, boxes), *others]) + LANE
            left = min([*map(self._left, boxes), *others]) - LANE
            way = self._start(edge), self._end(edge)
            lanes[edge] = min(right, left, key=lambda x: sum(abs(x - end) for end in way))
        return lanes

    def _pieces(self, edge: Edge) -> tuple[tuple[float, float, float], ...]:
        above, below = self.row[edge.source], self.row[edge.target]
        first = (self._start(edge), self.top[edge.source] + self.sizes[edge.source].height, self.bottoms[above])
        beside = [(self.lanes[edge], self.tops[above + 1], self.bottoms[below - 1])] if edge in self.lanes else []
        return (first, *beside, (self._end(edge), self.tops[below], self.top[edge.target]))
