"""Layer assignment and ordering: the part of the layout that does not depend on the sizes of boxes.

Boxes are in layers from top to bottom (topological generations with a maximum size). An edge over several layers has a
lane in each layer between, so that it never crosses a box; edges of one source share lanes. The order inside a layer
comes from barycenter sweeps.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import pairwise

from hra_fx.view.coordinates import Node

_PER_LAYER = 5
_SWEEPS = 12

#: The borders of the scope, as box numbers.
UPPER, LOWER = -1, -2


class Layering:
    """The layers of a scope.

    Attributes:
        links: the edges, including those from the upper border and to the lower border.
        level: the layer of every box.
        rows: the layers from top to bottom, each from left to right.
        below: for every node, the nodes of the next layer that its edges lead to.
    """

    def __init__(
        self, count: int, edges: Sequence[tuple[int, int]], inputs: Sequence[int], outputs: Sequence[int]
    ) -> None:
        """Order the layers.

        Args:
            count: number of boxes, which are in a topological order.
            edges: `(i, j)`, i < j.
            inputs: boxes that get an edge from the upper border.
            outputs: boxes that get an edge to the lower border.
        """
        self.links = [(UPPER, box) for box in inputs] + list(edges) + [(box, LOWER) for box in outputs]
        self.level = _levels(count, edges, inputs, outputs)
        # Dictionaries instead of sets, to keep the order.
        above: dict[Node, dict[Node, None]] = {(box, -1): {} for box in self.level}
        below: dict[Node, dict[Node, None]] = {(box, -1): {} for box in self.level}
        for source, target in self.links:
            chain = self.chain(source, target)
            for upper, lower in pairwise(chain):
                below.setdefault(upper, {})[lower] = None
                above.setdefault(lower, {})[upper] = None
        self.below = {node: list(below.get(node, ())) for node in {**above, **below}}
        self._above = {node: list(above.get(node, ())) for node in self.below}
        self.rows: list[list[Node]] = [[] for _ in range(max(self.level.values(), default=0) + 1)]
        for node in self.below:
            self.rows[self.row(node)].append(node)
        self._order()

    def chain(self, source: int, target: int) -> list[Node]:
        """An edge as nodes of neighboring layers; edges of one source share their lanes."""
        lanes = [(source, level) for level in range(self.level[source] + 1, self.level[target])]
        return [(source, -1), *lanes, (target, -1)]

    def row(self, node: Node) -> int:
        """The layer of a box or lane."""
        return self.level[node[0]] if node[1] < 0 else node[1]

    def _order(self) -> None:
        """Sort by barycenters in sweeps down and up, and keep the order with the fewest crossings."""
        best, fewest = [list(row) for row in self.rows], self._crossings()
        for sweep in range(_SWEEPS):
            if not fewest:
                break
            down = sweep % 2 == 0
            near = self._above if down else self.below
            place = {node: float(index) for row in self.rows for index, node in enumerate(row)}
            for row in (self.rows if down else self.rows[::-1])[1:]:
                center = {
                    node: sum(place[other] for other in near[node]) / len(near[node]) if near[node] else place[node]
                    for node in row
                }
                row.sort(key=lambda node: (center[node], place[node]))
                place.update((node, float(index)) for index, node in enumerate(row))
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def _crossings(self) -> int:
        place = {node: index for row in self.rows for index, node in enumerate(row)}
        total = 0
        for row in self.rows:
            seen: list[int] = []  # where the edges of the nodes so far end, sorted
            for node in row:
                for end in sorted(place[below] for below in self.below[node]):
                    total += len(seen) - bisect_right(seen, end)
                    insort(seen, end)
        return total


def _levels(
    count: int, edges: Sequence[tuple[int, int]], inputs: Sequence[int], outputs: Sequence[int]
) -> dict[int, int]:
    """A layer for every box: below its sources, not too full; boxes without sources are just above their readers."""
    sources: dict[int, list[int]] = {box: [] for box in range(count)}
    readers: dict[int, list[int]] = {box: [] for box in range(count)}
    for source, target in edges:
        sources[target].append(source)
        readers[source].append(target)
    level: dict[int, int] = {}
    filled: dict[int, int] = {}
    vacant: dict[int, int] = {}  # full layer -> one below that may have room
    for box in range(count):
        wanted = low = max((level[source] + 1 for source in sources[box]), default=1)
        while low in vacant:
            low = vacant[low]
        if low != wanted:
            vacant[wanted] = low
        level[box] = low
        filled[low] = filled.get(low, 0) + 1
        if filled[low] >= _PER_LAYER:
            vacant[low] = low + 1
    entering = set(inputs)
    for box in reversed(range(count)):
        if not sources[box] and readers[box] and box not in entering:
            level[box] = max(level[box], min(level[reader] for reader in readers[box]) - 1)
    # The borders are separate layers; without them the boxes start at the top.
    shift = 0 if inputs else -1
    levels = {box: value + shift for box, value in level.items()}
    if inputs:
        levels[UPPER] = 0
    if outputs:
        levels[LOWER] = max(levels.values(), default=0) + 1
    return levels
