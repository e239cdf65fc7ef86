"""Layer assignment and ordering: the part of the layout that does not depend on the sizes of boxes.

Boxes are in layers from top to bottom (topological generations with a maximum size). An edge over several layers has a
lane in each layer between, so that it never crosses a box; edges of one source share lanes. The order inside a layer
comes from barycenter sweeps. Nodes of adjacent layers are then aligned along edges that do not cross, so that chains
become straight lines (similar to Brandes and Köpf 2002, https://doi.org/10.1007/3-540-45848-4_3).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import networkx as nx

_PER_LAYER = 5
_SWEEPS = 12

#: The borders of the scope, as box numbers.
UPPER, LOWER = -1, -2

#: (box, -1), or (source box, layer) for a lane of its outgoing edges.
Node: TypeAlias = tuple[int, int]


class Layering:
    """The layers of a scope.

    Attributes:
        links: the edges, including those from the upper border and to the lower border.
        level: the layer of every box.
        graph: boxes, borders and lanes, with edges between adjacent layers.
        rows: the layers from top to bottom, each from left to right.
        over: node -> the node above that it is aligned with, if any.
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
        self.graph: nx.DiGraph[Node] = nx.DiGraph()
        self.graph.add_nodes_from((box, -1) for box in self.level)
        for source, target in self.links:
            nx.add_path(self.graph, self.chain(source, target))
        self.rows: list[list[Node]] = [[] for _ in range(max(self.level.values(), default=0) + 1)]
        for box, lane in self.graph:
            self.rows[self.level[box] if lane < 0 else lane].append((box, lane))
        self._order()
        self.over = self._aligned()

    def chain(self, source: int, target: int) -> list[Node]:
        """An edge as nodes of neighboring layers; edges of one source share their lanes."""
        lanes = [(source, level) for level in range(self.level[source] + 1, self.level[target])]
        return [(source, -1), *lanes, (target, -1)]

    def _order(self) -> None:
        """Sort by barycenters in sweeps down and up, and keep the order with the fewest crossings."""
        below = nx.to_dict_of_lists(self.graph)
        above = nx.to_dict_of_lists(self.graph.reverse())
        best, fewest = [list(row) for row in self.rows], self._crossings(below)
        for sweep in range(_SWEEPS):
            if not fewest:
                break
            down = sweep % 2 == 0
            near = above if down else below
            place = {node: float(index) for row in self.rows for index, node in enumerate(row)}
            for row in (self.rows if down else self.rows[::-1])[1:]:
                center = {
                    node: sum(place[other] for other in near[node]) / len(near[node]) if near[node] else place[node]
                    for node in row
                }
                row.sort(key=lambda node: (center[node], place[node]))
                place.update((node, float(index)) for index, node in enumerate(row))
            crossings = self._crossings(below)
            if crossings < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def _crossings(self, below: Mapping[Node, Sequence[Node]]) -> int:
        place = {node: index for row in self.rows for index, node in enumerate(row)}
        total = 0
        for row in self.rows:
            seen: list[int] = []  # where the edges of the nodes so far end, sorted
            for node in row:
                for end in sorted(place[lower] for lower in below[node]):
                    total += len(seen) - bisect_right(seen, end)
                    insort(seen, end)
        return total

    def _aligned(self) -> dict[Node, Node]:
        """Choose edges to draw straight: boxes with boxes first, then lanes with lanes, the longest paths first. No two
        of them cross or meet."""
        order = [node for row in self.rows for node in row]
        above: dict[Node, int] = {}  # length of the longest path from the top
        below: dict[Node, int] = {}
        for node in order:
            above[node] = max((above[source] + 1 for source in self.graph.pred[node]), default=0)
        for node in reversed(order):
            below[node] = max((below[reader] + 1 for reader in self.graph.succ[node]), default=0)
        place = {node: index for row in self.rows for index, node in enumerate(row)}
        over: dict[Node, Node] = {}
        for row in self.rows:
            edges = [(upper, node) for node in row for upper in self.graph.pred[node]]
            edges.sort(
                key=lambda edge: (_kind(*edge), -above[edge[0]] - below[edge[1]], place[edge[1]], place[edge[0]])
            )
            chosen: list[tuple[int, int]] = []
            for upper, node in edges:
                if all((place[upper] - a) * (place[node] - b) > 0 for a, b in chosen):
                    chosen.append((place[upper], place[node]))
                    over[node] = upper
        return over


def _kind(upper: Node, lower: Node) -> int:
    """The order of alignment: boxes with boxes, then lanes with lanes, then the ends of lanes."""
    is_lane = (upper[1] >= 0, lower[1] >= 0)
    return {(False, False): 0, (True, True): 1}.get(is_lane, 2)


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
    filled: Counter[int] = Counter()
    for box in range(count):
        low = max((level[source] + 1 for source in sources[box]), default=1)
        while filled[low] >= _PER_LAYER:
            low += 1
        level[box] = low
        filled[low] += 1
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
