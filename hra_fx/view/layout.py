"""Layered layout of one scope (after Sugiyama et al. 1981, https://doi.org/10.1109/TSMC.1981.4308636).

Layers and their order come from `layering`, x from `coordinates`. This module places boxes and routes edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hra_fx.view.coordinates import GAP_X, LANE, Size, x_coordinates
from hra_fx.view.layering import LOWER, UPPER, Layering, Node

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
    return _Layout(sizes, edges, inputs, outputs).arrangement()


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


class _Layout(Layering):
    """Layers with the sizes of boxes and the positions of all nodes."""

    def __init__(
        self,
        sizes: Sequence[Size],
        edges: Sequence[tuple[int, int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        super().__init__(len(sizes), edges, inputs, outputs)
        border = Size(0, 0)
        self.sizes = {**dict(enumerate(sizes)), UPPER: border, LOWER: border}
        x = x_coordinates(self, self.size)
        self.left = min((x[node] - self.size(node).width / 2 for node in x), default=0.0)
        self.right = max((x[node] + self.size(node).width / 2 for node in x), default=0.0)
        self.x = {node: value - self.left for node, value in x.items()}
        self.tops: list[float] = []
        self.bottoms: list[float] = []
        y = 0.0
        for row in self.rows:
            self.tops.append(y)
            self.bottoms.append(y + max((self.size(node).height for node in row), default=0))
            y = self.bottoms[-1] + GAP_Y

    def size(self, node: Node) -> Size:
        return self.sizes[node[0]] if node[1] < 0 else Size(LANE, 0)

    def top(self, box: int) -> float:
        """The upper edge of a box, which is in the middle of its layer."""
        level = self.level[box]
        return (self.tops[level] + self.bottoms[level]) / 2 - self.sizes[box].height / 2

    def arrangement(self) -> Arrangement:
        boxes = sorted(box for box in self.level if box >= 0)
        corners = tuple((self.x[box, -1] - self.sizes[box].width / 2, self.top(box)) for box in boxes)
        ends = self.ends()
        routes = tuple(self.route(source, target, ends[source, target]) for source, target in self.links)
        width = self.right - self.left
        enter, leave = (self.x.get((border, -1), width / 2) for border in (UPPER, LOWER))
        return Arrangement(width, self.bottoms[-1], corners, routes, enter, leave)

    def route(self, source: int, target: int, end: float) -> Route:
        start = self.x[source, -1] + self.sizes[source].leave
        begin = self.top(source) + self.sizes[source].height
        pieces = [(start, begin, self.bottoms[self.level[source]])]
        lanes = self.chain(source, target)[1:-1]
        pieces += [(self.x[lane], self.tops[lane[1]], self.bottoms[lane[1]]) for lane in lanes]
        pieces.append((end, self.tops[self.level[target]], self.top(target)))
        return Route(source if source >= 0 else None, target if target >= 0 else None, tuple(pieces))

    def ends(self) -> dict[tuple[int, int], float]:
        """x at which each edge enters: the straightest one at the entry, the others on the side they come from."""
        ends: dict[tuple[int, int], float] = {}
        for target in {target for _, target in self.links}:
            entry = self.x[target, -1] + self.sizes[target].enter
            coming: list[tuple[float, int]] = []
            for source in [source for source, other in self.links if other == target]:
                last = self.chain(source, target)[-2]
                leave = self.sizes[source].leave if last[1] < 0 else 0.0
                coming.append((self.x[last] + leave - entry, source))
            coming.sort(key=lambda pair: (abs(pair[0]), pair[1]))
            ends[coming[0][1], target] = entry
            room = max(self.sizes[target].width / 2 - abs(self.sizes[target].enter) - 10, 0.0)
            for side in (-1, 1):
                others = [source for shift, source in coming[1:] if (shift > 0) == (side > 0)]
                step = min(16.0, room / max(len(others), 1))
                for place, source in enumerate(others, start=1):
                    ends[source, target] = entry + side * step * place
        return ends
