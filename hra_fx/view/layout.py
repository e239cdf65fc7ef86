"""Layered layout of one scope (after Sugiyama et al. 1981, https://doi.org/10.1109/TSMC.1981.4308636).

Layers and their order come from `layering`, x from `coordinates`. This module places boxes and routes edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from hra_fx.view.coordinates import GAP_X, LANE, Node, Size, x_coordinates
from hra_fx.view.layering import LOWER, UPPER, Layering

GAP_Y = 24.0
_UNEVEN = 3.5  # boxes whose heights differ by a larger factor do not share a row


@dataclass(frozen=True)
class Route:
    """An edge: vertical segments `(x, from y, to y)`, joined by curves in the gaps between layers.

    Attributes:
        source: the box it leaves, `None` for the scope's upper border.
        target: the box it enters, `None` for the lower border.
        pieces: from top to bottom.
    """

    source: int | None
    target: int | None
    pieces: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Arrangement:
    """The layout of a scope: its size, the upper left corners of its boxes, its edges, and x of its ports."""

    width: float
    height: float
    corners: tuple[tuple[float, float], ...]
    routes: tuple[Route, ...] = ()
    enter: float = 0.0
    leave: float = 0.0


def layered(
    sizes: Sequence[Size],
    edges: Sequence[tuple[int, int]],
    inputs: Sequence[int] = (),
    outputs: Sequence[int] = (),
) -> Arrangement:
    """Place boxes so that every edge points down.

    Args:
        sizes: the boxes, in a topological order.
        edges: `(i, j)`, i < j.
        inputs: boxes that get an edge from the upper border.
        outputs: boxes that get an edge to the lower border.
    """
    return _Layering(sizes, edges, inputs, outputs).arrangement()


def in_rows(sizes: Sequence[Size], limit: float) -> Arrangement:
    """Place boxes in rows of width `limit`, in order. Very tall boxes do not share a row with low ones."""
    corners: list[tuple[float, float]] = []
    x = y = row = width = 0.0
    for size in sizes:
        uneven = max(size.height, row) > _UNEVEN * min(size.height, row)
        if x and (x + size.width > limit or uneven):
            x, y, row = 0.0, y + row + GAP_X, 0.0
        corners.append((x, y))
        x += size.width + GAP_X
        row = max(row, size.height)
        width = max(width, x - GAP_X)
    return Arrangement(width, y + row, tuple(corners), enter=width / 2, leave=width / 2)


class _Layering:
    def __init__(
        self,
        sizes: Sequence[Size],
        edges: Sequence[tuple[int, int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        self.sizes = dict(enumerate(sizes))
        self.sizes[UPPER] = self.sizes[LOWER] = Size(0, 0)
        layers = Layering(len(sizes), edges, inputs, outputs)
        self.links, self.level, self.rows, self.chain = layers.links, layers.level, layers.rows, layers.chain
        self.graph: nx.DiGraph[Node] = nx.DiGraph()
        self.graph.add_nodes_from(layers.below)
        self.graph.add_edges_from((node, lower) for node, below in layers.below.items() for lower in below)

    def size(self, node: Node) -> Size:
        return self.sizes[node[0]] if node[1] < 0 else Size(LANE, 0)

    def arrangement(self) -> Arrangement:
        x = x_coordinates(self.rows, self.graph, self.size)
        tops: list[float] = []
        bottoms: list[float] = []
        y = 0.0
        for row in self.rows:
            tops.append(y)
            bottoms.append(y + max((self.size(node).height for node in row), default=0))
            y = bottoms[-1] + GAP_Y
        left = min((x[node] - self.size(node).width / 2 for node in x), default=0.0)
        right = max((x[node] + self.size(node).width / 2 for node in x), default=0.0)
        x = {node: value - left for node, value in x.items()}
        middle = [(top + bottom) / 2 for top, bottom in zip(tops, bottoms, strict=True)]
        top_of = {box: middle[level] - self.sizes[box].height / 2 for box, level in self.level.items()}
        corners = tuple((x[box, -1] - self.sizes[box].width / 2, top_of[box]) for box in sorted(self.level) if box >= 0)
        ends = self.ends(x)
        routes = tuple(self.route(link, x, ends, top_of, tops, bottoms) for link in self.links)
        width = right - left
        return Arrangement(
            width, bottoms[-1], corners, routes, x.get((UPPER, -1), width / 2), x.get((LOWER, -1), width / 2)
        )

    def route(
        self,
        link: tuple[int, int],
        x: dict[Node, float],
        ends: dict[tuple[int, int], float],
        top_of: dict[int, float],
        tops: list[float],
        bottoms: list[float],
    ) -> Route:
        source, target = link
        start = x[source, -1] + self.sizes[source].leave
        begin = top_of[source] + self.sizes[source].height
        pieces = [(start, begin, bottoms[self.level[source]])]
        pieces += [(x[lane], tops[lane[1]], bottoms[lane[1]]) for lane in self.chain(source, target)[1:-1]]
        pieces.append((ends[link], tops[self.level[target]], top_of[target]))
        return Route(source if source >= 0 else None, target if target >= 0 else None, tuple(pieces))

    def ends(self, x: dict[Node, float]) -> dict[tuple[int, int], float]:
        """x at which each edge enters: the straightest one at the entry, the others on the side they come from."""
        ends: dict[tuple[int, int], float] = {}
        for target in {target for _, target in self.links}:
            entry = x[target, -1] + self.sizes[target].enter
            coming: list[tuple[float, int]] = []
            for source in [source for source, other in self.links if other == target]:
                last = self.chain(source, target)[-2]
                coming.append((x[last] + (self.sizes[source].leave if last[1] < 0 else 0.0) - entry, source))
            straight = min(coming, key=lambda pair: (abs(pair[0]), pair[1]))
            room = max(self.sizes[target].width / 2 - abs(self.sizes[target].enter) - 10, 0.0)
            for side in (-1, 1):
                others = sorted(
                    (pair for pair in coming if pair != straight and (pair[0] > 0) == (side > 0)),
                    key=lambda pair: side * pair[0],
                )
                step = min(16.0, room / max(len(others), 1))
                for place, (_, source) in enumerate(others, start=1):
                    ends[source, target] = entry + side * step * place
            ends[straight[1], target] = entry
        return ends
