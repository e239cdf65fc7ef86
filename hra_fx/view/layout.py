"""Layout of one scope: boxes in rows from top to bottom.

An edge to the next row is a curve between the rows. A longer edge passes the rows between on their right side, so that
no edge crosses a box. Long edges from the same source share their path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

GAP_X, GAP_Y = 22.0, 24.0
LANE = 14.0  # distance of long edges from boxes and from each other
PER_ROW = 5


@dataclass(frozen=True)
class Size:
    """A box to place: width, height, and where edges enter (top) and leave (bottom), relative to its center."""

    width: float
    height: float
    enter: float = 0.0
    leave: float = 0.0


@dataclass(frozen=True)
class Route:
    """An edge: vertical segments `(x, from y, to y)` from top to bottom, joined by curves in the gaps between rows."""

    source: int | None  # the box that it leaves; `None` for the scope's upper border
    target: int | None  # the box that it enters; `None` for the lower border
    pieces: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Arrangement:
    """The layout of a scope: its size, the upper left corners of its boxes, its edges, and the x of its ports."""

    width: float
    height: float
    corners: tuple[tuple[float, float], ...]
    routes: tuple[Route, ...] = ()
    enter: float = 0.0
    leave: float = 0.0


def rows_of(count: int, edges: Sequence[tuple[int, int]], inputs: Sequence[int] = ()) -> list[int]:
    """The row of every box: below its sources, with a limited width.

    A box without sources is right above its readers, unless it is one of `inputs`, which get an edge from the upper
    border. The boxes are in topological order: an edge `(i, j)` has i < j.
    """
    graph: nx.DiGraph[int] = nx.DiGraph(edges)
    graph.add_nodes_from(range(count))
    rows: list[int] = []
    filled: Counter[int] = Counter()
    for box in range(count):
        low = max((rows[source] + 1 for source in graph.pred[box]), default=0)
        while filled[low] >= PER_ROW:
            low += 1
        rows.append(low)
        filled[low] += 1
    for box in reversed(range(count)):
        if box not in inputs and not graph.pred[box]:
            rows[box] = max(rows[box], min((rows[reader] for reader in graph.succ[box]), default=0) - 1)
    return rows


def layered(
    sizes: Sequence[Size],
    edges: Sequence[tuple[int, int]],
    inputs: Sequence[int] = (),
    outputs: Sequence[int] = (),
    rows: Sequence[int] | None = None,
) -> Arrangement:
    """Place boxes in rows (by default those of `rows_of`), so that every edge points down.

    `inputs` get an edge from the upper border, and `outputs` one to the lower border.
    """
    rows = rows_of(len(sizes), edges, inputs) if rows is None else rows
    return _Layout(sizes, edges, inputs, outputs, rows).arrangement()


class _Layout:
    """The positions of all boxes. The borders are boxes of size 0, which are alone in the first and the last row."""

    def __init__(
        self,
        sizes: Sequence[Size],
        edges: Sequence[tuple[int, int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        last = len(sizes)
        upper, lower = last, last + 1
        self.sizes = [*sizes, Size(0, 0), Size(0, 0)]
        self.links = [(upper, box) for box in inputs] + list(edges) + [(box, lower) for box in outputs]
        self.sources: list[list[int]] = [[] for _ in self.sizes]
        for source, target in self.links:
            self.sources[target].append(source)
        self.row = [row + 1 for row in rows] + [0, max(rows, default=-1) + 2]
        self.rows: list[list[int]] = [[] for _ in range(self.row[lower] + 1)]
        for box, row in enumerate(self.row):
            self.rows[row].append(box)
        self.x = [0.0] * (last + 2)
        for boxes in self.rows[1:]:
            self._place(boxes)
        entries = [self.x[box] + sizes[box].enter for box in inputs if self.row[box] == 1]
        self.x[upper] = sum(entries) / len(entries) if entries else 0.0
        self.tops, self.bottoms, y = [0.0], [0.0], GAP_Y * bool(inputs)
        for boxes in self.rows[1:-1]:
            self.tops.append(y)
            self.bottoms.append(y + max((self.sizes[box].height for box in boxes), default=0))
            y = self.bottoms[-1] + GAP_Y
        self.tops.append(y if outputs else self.bottoms[-1])
        self.bottoms.append(self.tops[-1])
        self.lanes = self._lanes()

    def _place(self, boxes: list[int]) -> None:
        """Place a row: each box below its sources in the row above, with gaps between boxes, and balanced sides."""
        wanted = {}
        for box in boxes:
            above = [source for source in self.sources[box] if self.row[source] == self.row[box] - 1]
            starts = [self.x[i] + self.sizes[i].leave - self.sizes[box].enter for i in above]
            wanted[box] = sum(starts) / len(starts) if starts else 0.0
        boxes.sort(key=lambda box: (wanted[box], box))
        free = float("-inf")
        for box in boxes:
            half = self.sizes[box].width / 2
            self.x[box] = max(wanted[box], free + half)
            free = self.x[box] + half + GAP_X
        shift = sum(wanted[box] - self.x[box] for box in boxes) / max(len(boxes), 1)
        for box in boxes:
            self.x[box] += shift

    def _right(self, box: int) -> float:
        return self.x[box] + self.sizes[box].width / 2

    def _lanes(self) -> dict[int, float]:
        """Source -> x of its long edges, next to the rows that they pass. Shorter edges are closer to the boxes."""
        spans: dict[int, range] = {}
        for source, target in self.links:
            rows = range(self.row[source] + 1, self.row[target])
            if len(rows) > len(spans.get(source, ())):
                spans[source] = rows
        lanes: dict[int, float] = {}
        for source in sorted(spans, key=lambda source: (len(spans[source]), source)):
            rows = spans[source]
            beside = [self._right(box) for row in rows for box in self.rows[row]]
            beside += [x for other, x in lanes.items() if set(rows) & set(spans[other])]
            lanes[source] = max(beside) + LANE
        return lanes

    def _top(self, box: int) -> float:
        """The upper edge of a box, which is vertically centered in its row."""
        row = self.row[box]
        return (self.tops[row] + self.bottoms[row] - self.sizes[box].height) / 2

    def arrangement(self) -> Arrangement:
        count = len(self.sizes) - 2
        left = min((self.x[box] - self.sizes[box].width / 2 for box in range(count)), default=0.0)
        right = max([*map(self._right, range(count)), *(x + 1 for x in self.lanes.values())], default=0.0)
        corners = tuple((self.x[box] - self.sizes[box].width / 2 - left, self._top(box)) for box in range(count))
        ends = self._ends()
        routes = tuple(self._route(source, target, ends[source, target], left) for source, target in self.links)
        enter, leave = self.x[count] - left, self.x[count + 1] - left
        return Arrangement(right - left, self.bottoms[-1], corners, routes, enter, leave)

    def _route(self, source: int, target: int, end: float, left: float) -> Route:
        above, below, count = self.row[source], self.row[target], len(self.sizes) - 2
        begin = self._top(source) + self.sizes[source].height
        pieces = [(self.x[source] + self.sizes[source].leave, begin, self.bottoms[above])]
        if below - above > 1:
            pieces.append((self.lanes[source], self.tops[above + 1], self.bottoms[below - 1]))
        pieces.append((end, self.tops[below], self._top(target)))
        shifted = tuple((x - left, start, stop) for x, start, stop in pieces)
        return Route(source if source < count else None, target if target < count else None, shifted)

    def _ends(self) -> dict[tuple[int, int], float]:
        """The x at which each edge enters: the straightest edge at the entry, others on the side they come from."""
        ends: dict[tuple[int, int], float] = {}
        for target, sources in enumerate(self.sources):
            entry = self.x[target] + self.sizes[target].enter
            coming: list[tuple[float, int]] = []
            for source in sources:
                is_long = self.row[target] - self.row[source] > 1
                start = self.lanes[source] if is_long else self.x[source] + self.sizes[source].leave
                coming.append((start - entry, source))
            coming.sort(key=lambda pair: (abs(pair[0]), pair[1]))
            ends.update(((source, target), entry) for _, source in coming[:1])
            room = max(self.sizes[target].width / 2 - abs(self.sizes[target].enter) - 10, 0.0)
            for side in (-1, 1):
                others = [source for shift, source in coming[1:] if (shift > 0) == (side > 0)]
                step = min(16.0, room / max(len(others), 1))
                for place, source in enumerate(others, start=1):
                    ends[source, target] = entry + side * step * place
        return ends
