"""Layout: the text, the size and the position of every box, in rows from top to bottom.

An edge to the next row is a curve between the rows. A longer edge passes the rows between on one side, so that no edge
crosses a box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx

from hra_fx.reporting.words import shorten
from hra_fx.view.heatmap import Cells, Heatmap
from hra_fx.view.opening import Block
from hra_fx.view.theme import width
from hra_fx.view.tree import Edge, Leaf, Scope, span

NAME, DETAIL = 12.5, 11.0  # font sizes
STRIP = 19.0  # height of the adapter strip on top of its layer
HEADER = 27.0  # height of an open scope's title
PORT = 18.0  # height of a port of an open scope
#: The looks of single boxes with the detail below the name; in other boxes, it is next to the name.
STACKED = ("adapted_layer", "closed")
_PAD = 14.0
_LETTERS, _PORT = 34, 48
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


@dataclass(frozen=True)
class Route:
    """An edge: vertical segments `(x, from y, to y)` from top to bottom, joined by curves in the gaps between rows."""

    edge: Edge  # its source is `~p` for port p of the scope, and its target -1 for the lower border
    pieces: tuple[tuple[float, float, float], ...]


def rows_of(count: int, edges: Sequence[Edge]) -> list[int]:
    """The row of every box: below its sources, with a limited width.

    A box without sources is right above its readers. The boxes are in topological order: an edge `(i, j, p)` has i < j.
    """
    graph: nx.DiGraph[int] = nx.DiGraph((edge.source, edge.target) for edge in edges)
    graph.add_nodes_from(range(count))
    rows: list[int] = []
    filled: Counter[int] = Counter()
    for box in range(count):
        low = max((rows[source] + 1 for source in graph.pred[box] if source >= 0), default=0)
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

    The ports are in the first row. `outputs` get an edge to the lower border, a box of size 0 alone in the last row.

    Attributes:
        width: of all boxes and edges.
        height: of all rows.
        corners: the upper left corner of each box, and then of each port.
        routes: `edges`, and those to the lower border.
        enter: the x of each port.
        leave: the x at which edges enter the lower border.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        edges: Sequence[Edge],
        outputs: Sequence[int],
        ports: Sequence[Size],
        rows: Sequence[int],
    ) -> None:
        """Place all boxes. `rows` has the row of each box, such as from `rows_of`."""
        self.sizes = [*sizes, *ports, Size(0, 0)]
        self._lower = len(self.sizes) - 1
        count, self._ports = len(sizes), range(len(sizes), self._lower)
        links = [edge._replace(source=count + ~edge.source) if edge.source < 0 else edge for edge in edges]
        self.links = list(dict.fromkeys(links + [Edge(box, self._lower, 0) for box in outputs]))
        self.row = [*(row + 1 for row in rows), *(0 for _ in ports), max(rows, default=-1) + 2]
        self.rows: list[list[int]] = [[] for _ in range(self.row[self._lower] + 1)]
        for box, row in enumerate(self.row):
            self.rows[row].append(box)
        self._place_all(bool(outputs))
        self.lanes = self._lanes()
        lefts = (self.x[box] - self.sizes[box].width / 2 for box in range(self._lower))
        left = min([*lefts, *(x - 1 for x in self.lanes.values())], default=0.0)
        right = max([*map(self._right, range(self._lower)), *(x + 1 for x in self.lanes.values())], default=0.0)
        self.width, self.height = right - left, self.bottoms[-1]
        self.corners = [(self.x[i] - self.sizes[i].width / 2 - left, self._top(i)) for i in range(self._lower)]
        ends = self._ends()
        self.routes = tuple(self._route(link, ends[link], left) for link in self.links)
        self.enter, self.leave = tuple(self.x[port] - left for port in self._ports), self.x[self._lower] - left

    def _place_all(self, has_outputs: bool) -> None:
        """Set the x of each box, and the top and the bottom of each row."""
        self.x = [0.0] * len(self.sizes)
        below: dict[int, list[float]] = {port: [] for port in self._ports}
        above: list[list[tuple[int, int]]] = [[] for _ in self.sizes]
        for source, target, port, _ in self.links:
            if self.row[source] == self.row[target] - 1:
                above[target].append((source, port))
        for boxes in self.rows[1:]:
            starts = {
                box: [self.x[i] + self.sizes[i].leave - self.sizes[box].enter[port] for i, port in above[box]]
                for box in boxes
            }
            self._place(boxes, starts)
        for box in self.rows[1]:
            for source, port in above[box]:
                below[source].append(self.x[box] + self.sizes[box].enter[port])
        right = max(map(self._right, self.rows[1]), default=0.0)
        ends = {port: places or [right] for port, places in below.items()}
        self._place(self.rows[0], ends)
        self.tops, self.bottoms = [0.0], [max((self.sizes[port].height for port in self._ports), default=0.0)]
        y = self.bottoms[0] + GAP_Y * bool(self._ports)
        for boxes in self.rows[1:-1]:
            self.tops.append(y)
            self.bottoms.append(y + max((self.sizes[box].height for box in boxes), default=0))
            y = self.bottoms[-1] + GAP_Y
        self.tops.append(y if has_outputs else self.bottoms[-1])
        self.bottoms.append(self.tops[-1])

    def _place(self, boxes: list[int], wishes: Mapping[int, list[float]]) -> None:
        """Place a row: each box at the mean of its wishes, with gaps between boxes, and balanced sides."""
        wanted = {box: sum(wishes[box]) / len(wishes[box]) if wishes[box] else 0.0 for box in boxes}
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

    def _lanes(self) -> dict[tuple[int, int, int], float]:
        """The x of each long edge beside the rows that it passes, on the side with the shorter way.

        Shorter edges are closer to the boxes.
        """
        ends = {(source, target, port): (self.row[source], self.row[target]) for source, target, port, _ in self.links}
        passed = {link: range(above + 1, below) for link, (above, below) in ends.items() if below - above > 1}
        lanes: dict[tuple[int, int, int], float] = {}
        for source, target, port in sorted(passed, key=lambda link: (len(passed[link]), link)):
            rows = passed[source, target, port]
            boxes = [box for row in rows for box in self.rows[row]]
            others = [x for other, x in lanes.items() if set(rows) & set(passed[other])]
            right = max([*map(self._right, boxes), *others]) + LANE
            left = min([*(self.x[box] - self.sizes[box].width / 2 for box in boxes), *others]) - LANE
            way = (self.x[source] + self.sizes[source].leave, self.x[target] + self.sizes[target].enter[port])
            lanes[source, target, port] = min(right, left, key=lambda x: sum(abs(x - end) for end in way))
        return lanes

    def _top(self, box: int) -> float:
        """The upper edge of a box, which is vertically centered in its row."""
        row = self.row[box]
        return (self.tops[row] + self.bottoms[row] - self.sizes[box].height) / 2

    def _route(self, link: Edge, end: float, left: float) -> Route:
        source, target, *_ = link
        above, below = self.row[source], self.row[target]
        begin = self._top(source) + self.sizes[source].height
        pieces = [(self.x[source] + self.sizes[source].leave, begin, self.bottoms[above])]
        if below - above > 1:
            pieces.append((self.lanes[link[:3]], self.tops[above + 1], self.bottoms[below - 1]))
        pieces.append((end, self.tops[below], self._top(target)))
        shifted = tuple((x - left, start, stop) for x, start, stop in pieces)
        begins = source if source not in self._ports else ~self._ports.index(source)
        return Route(link._replace(source=begins, target=-1 if target == self._lower else target), shifted)

    def _ends(self) -> dict[Edge, float]:
        """The x at which each edge enters: the straightest edge at the port, others on the side they come from."""
        by_port: dict[tuple[int, int], list[tuple[float, Edge]]] = {}
        for link in self.links:  # each with the x from which it comes
            source, target, port, _ = link
            start = self.lanes.get(link[:3], self.x[source] + self.sizes[source].leave)
            by_port.setdefault((target, port), []).append((start, link))
        ends: dict[Edge, float] = {}
        for (target, port), coming in by_port.items():
            size, entry = self.sizes[target], self.x[target] + self.sizes[target].enter[port]
            coming.sort()
            straight = min(range(len(coming)), key=lambda place: abs(coming[place][0] - entry))
            room = max(size.width / 2 - abs(size.enter[port]) - 10, 0.0)
            step = min(16.0, room / max(straight, len(coming) - 1 - straight, 1))
            ends.update((link, entry + (place - straight) * step) for place, (_, link) in enumerate(coming))
        return ends


@dataclass(frozen=True)
class Box:
    """A placed block. `x` and `y` are the position of its upper left corner in its parent."""

    block: Block
    size: Size
    name: str
    detail: str
    count: str  # "× 6" for six modules
    tip: str  # the tooltip
    strip: str = ""  # the text of the adapter
    heat: str = ""  # the color of the strip, if a heatmap is shown
    cells: Cells = field(default_factory=Cells)
    x: float = 0.0
    y: float = 0.0
    parts: tuple[Box, ...] = ()
    ports: tuple[tuple[str, float, float], ...] = ()  # name, left and width; empty if there is only one
    routes: tuple[Route, ...] = ()
    body: tuple[float, float] = (0.0, 0.0)  # the position of the inside


def place(block: Block, heatmap: Heatmap, *, root: bool = False) -> Box:
    """Compute the size of a block, and place everything inside it. The root does not have a border or a title."""
    item = block.item
    name = shorten(span(item), _PORT if block.look == "port" else _LETTERS)
    detail = shorten(item.detail if isinstance(item, Leaf) else item.class_name, _LETTERS)
    count = f"× {item.count}" if item.count > 1 else ""
    box = Box(block, Size(0, 0), name, "" if detail == name else detail, count, _tip(block, heatmap))
    return _single(box, heatmap) if block.parts is None else _open(box, block.parts, heatmap, root=root)


def _tip(block: Block, heatmap: Heatmap) -> str:
    """The tooltip: the adapted layers of a box that is not open, and why its layers have no adapter."""
    item = block.item
    if isinstance(item, Leaf):
        lines = [f"{item.target}: {item.detail or item.op}", *filter(None, [item.shape])]
        lines += [*map(heatmap.line, item.marks), *(f"{path} is trained in full" for path in item.trained)]
        return "\n".join([*lines, *(f"{layer.path} has no adapter: {layer.reason}" for layer in item.skipped)])
    return "\n".join(
        [f"{item.path or item.name}: {item.class_name}", *map(heatmap.line, () if block.parts else item.marks)]
    )


def _single(box: Box, heatmap: Heatmap) -> Box:
    item, look = box.block.item, box.block.look
    if look not in STACKED:
        wide = width(box.name, NAME) + (7 + width(box.detail, DETAIL) if box.detail else 0) + count_width(box.count)
        least, high = (60, 24) if look == "port" else (70, 29)
        return replace(box, size=Size(max(wide + 2 * _PAD, least), high))
    words, heat = heatmap.strip(item)
    strip, value, detail = "", "", box.detail
    if isinstance(item, Scope):
        detail += f" · {len(item.marks)} adapted" * bool(item.marks) + f" · {words}" * bool(words)
        detail += f" · {len(item.skipped)} not adapted" * bool(item.skipped)
    elif not item.marks:
        strip = "same layer, called again"
    elif item.op == "eager":
        strip = f"r {item.rank} · d {item.width} · not traced"
    elif item.rank:
        strip, value = f"r {item.rank} · d {item.width}", f" · {words}" * bool(words)
    else:
        strip, heat = "no active adapter", ""  # nothing is rotated
    name = width(box.name, NAME, bold=True) + count_width(box.count)
    wide = max(name, width(detail, DETAIL), width(strip + value, DETAIL, bold=True) + 12)
    cells = heatmap.cells(item, wide)
    size = Size(wide + 2 * _PAD, (STRIP if strip else 8) + 39 + cells.height)
    heat = heat if strip else ""
    return replace(box, size=size, detail=detail, strip=strip + value, heat=heat, cells=cells)


def _open(box: Box, blocks: tuple[Block, ...], heatmap: Heatmap, *, root: bool) -> Box:
    scope = box.block.item
    assert isinstance(scope, Scope)  # only scopes have parts
    parts = [place(block, heatmap) for block in blocks]
    sizes = [part.size for part in parts]
    origins = list(dict.fromkeys(scope.ports))  # values from the same box or module share a port
    edges = _drawn(scope, blocks)
    names = [shorten(name, _LETTERS) for name in origins if len(origins) > 1]
    ports = [Size(width(name, DETAIL) + 16, PORT) for name in names] or [Size(0, 0) for _ in origins]
    inner = Layout(sizes, edges, scope.outputs, ports, scope_rows(scope))
    left, top, wide, high = 0.0, 0.0, inner.width, inner.height
    if not root:
        title = width(box.name, NAME, bold=True) + 8 + width(box.detail, DETAIL) + count_width(box.count)
        wide = max(title, inner.width) + 2 * _PAD
        left, top = (wide - inner.width) / 2, HEADER + (0 if scope.ports else 12)
        high = top + inner.height + (0 if scope.outputs else 12)
    corners = inner.corners[len(parts) :]
    return replace(
        box,
        size=Size(wide, high, tuple(left + x - wide / 2 for x in inner.enter), left + inner.leave - wide / 2),
        parts=tuple(replace(part, x=x, y=y) for part, (x, y) in zip(parts, inner.corners, strict=False)),
        ports=tuple((name, x, size.width) for name, (x, _), size in zip(names, corners, ports, strict=False)),
        routes=inner.routes,
        body=(left, top),
    )


def _drawn(scope: Scope, blocks: Sequence[Block]) -> list[Edge]:
    """The edges between the ports that are drawn: one port for each origin of values, and one of a closed module."""
    shapes: dict[tuple[int, int, int], dict[str, None]] = {}
    for source, target, port, shape in scope.edges:
        reader = blocks[target]
        if source < 0:
            source = ~_drawn_port(scope, ~source)
        port = 0 if isinstance(reader.item, Leaf) or reader.parts is None else _drawn_port(reader.item, port)
        shapes.setdefault((source, target, port), {})[shape] = None
    return [Edge(*ends, " + ".join([*own][:1] + [str(len(own) - 1)] * (len(own) > 1))) for ends, own in shapes.items()]


def _drawn_port(scope: Scope, port: int) -> int:
    return list(dict.fromkeys(scope.ports)).index(scope.ports[port])


def scope_rows(scope: Scope) -> list[int]:
    """The row of every item. In a traced scope, edges determine it; otherwise modules are below each other in order."""
    if not scope.eager:
        return rows_of(len(scope.items), scope.edges)
    rows = [0]
    for index in range(1, len(scope.items)):
        alone = any(isinstance(item, Scope) for item in scope.items[index - 1 : index + 1])
        rows.append(rows[-1] + (alone or rows.count(rows[-1]) >= PER_ROW))
    return rows


def count_width(count: str) -> float:
    """The width that the number of modules takes in a box."""
    return width(count, DETAIL, bold=True) + 22 if count else 0.0
