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
from hra_fx.view.opening import Opening, look_of
from hra_fx.view.theme import width
from hra_fx.view.tree import Edge, Item, Leaf, Scope, span

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

    edge: Edge
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

    Attributes:
        width: of all boxes and edges.
        height: of all rows.
        x: the center of each box.
        top: the upper edge of each box, which is vertically centered in its row.
        routes: the edges.
    """

    def __init__(self, sizes: Sequence[Size], edges: Sequence[Edge], rows: Sequence[int], *, has_ports: bool) -> None:
        """Place all boxes. With `has_ports`, the first row follows the second one, and not the other way round."""
        self.sizes, self.edges, self.row = sizes, edges, rows
        self.rows = [[box for box, own in enumerate(rows) if own == row] for row in range(max(rows) + 1)]
        self.x = [0.0] * len(sizes)
        for boxes in self.rows[has_ports:]:
            self._place(boxes, {box: self._above(box) for box in boxes})
        if has_ports:
            right = max(map(self._right, self.rows[1]), default=0.0)
            self._place(self.rows[0], {port: self._below(port) or [right] for port in self.rows[0]})
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
        ends = self._ends()
        self.routes = tuple(Route(edge, self._pieces(edge, ends[edge])) for edge in edges)

    def _left(self, box: int) -> float:
        return self.x[box] - self.sizes[box].width / 2

    def _right(self, box: int) -> float:
        return self.x[box] + self.sizes[box].width / 2

    def _start(self, edge: Edge) -> float:
        return self.x[edge.source] + self.sizes[edge.source].leave

    def _end(self, edge: Edge) -> float:
        return self.x[edge.target] + self.sizes[edge.target].enter[edge.port]

    def _is_short(self, edge: Edge) -> bool:
        return self.row[edge.target] - self.row[edge.source] == 1

    def _above(self, box: int) -> list[float]:
        """The x of a box for which each edge from the row above is straight."""
        edges = [edge for edge in self.edges if edge.target == box and self._is_short(edge)]
        return [self._start(edge) - self.sizes[box].enter[edge.port] for edge in edges]

    def _below(self, port: int) -> list[float]:
        """The x of a port for which each edge to the row below is straight."""
        return [self._end(edge) for edge in self.edges if edge.source == port and self._is_short(edge)]

    def _place(self, boxes: list[int], wishes: Mapping[int, list[float]]) -> None:
        """Place a row: each box at the mean of its wishes, with gaps between boxes, and balanced sides."""
        wanted = {box: sum(wishes[box]) / max(len(wishes[box]), 1) for box in boxes}
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

    def _ends(self) -> dict[Edge, float]:
        """The x at which each edge enters: the straightest edge at the port, others on the side they come from."""
        by_port: dict[tuple[int, int], list[tuple[float, Edge]]] = {}
        for edge in self.edges:  # each with the x from which it comes
            by_port.setdefault(edge[1:3], []).append((self.lanes.get(edge, self._start(edge)), edge))
        ends: dict[Edge, float] = {}
        for (target, port), coming in by_port.items():
            size, entry = self.sizes[target], self._end(coming[0][1])
            coming.sort()
            straight = min(range(len(coming)), key=lambda place: abs(coming[place][0] - entry))
            room = max(size.width / 2 - abs(size.enter[port]) - 10, 0.0)
            step = min(16.0, room / max(straight, len(coming) - 1 - straight, 1))
            ends.update((edge, entry + (place - straight) * step) for place, (_, edge) in enumerate(coming))
        return ends

    def _pieces(self, edge: Edge, end: float) -> tuple[tuple[float, float, float], ...]:
        above, below = self.row[edge.source], self.row[edge.target]
        first = (self._start(edge), self.top[edge.source] + self.sizes[edge.source].height, self.bottoms[above])
        beside = [(self.lanes[edge], self.tops[above + 1], self.bottoms[below - 1])] if edge in self.lanes else []
        return (first, *beside, (end, self.tops[below], self.top[edge.target]))


@dataclass(frozen=True)
class Box:
    """A placed item. `x` and `y` are the position of its upper left corner in its parent."""

    item: Item
    look: str
    name: str
    detail: str
    count: str  # "× 6" for six modules
    tip: str  # the tooltip
    size: Size = Size(0, 0)
    strip: str = ""  # the text of the adapter
    heat: str = ""  # the color of the strip, if a heatmap is shown
    cells: Cells = field(default_factory=Cells)
    x: float = 0.0
    y: float = 0.0
    parts: tuple[Box, ...] | None = None  # `None` if it is not open
    ports: tuple[tuple[str, float, float], ...] = ()  # name, left and width; empty if there is only one
    routes: tuple[Route, ...] = ()  # between the parts, the ports and the lower border, numbered in this order
    body: tuple[float, float] = (0.0, 0.0)  # the position of the inside

    def looks(self) -> set[str]:
        """The looks of all boxes inside."""
        return {look for part in self.parts or () for look in (part.look, *part.looks())}


def place(item: Item, is_open: Opening, heatmap: Heatmap, *, root: bool = False) -> Box:
    """Compute the size of an item, and place everything inside it. The root does not have a border or a title."""
    opened = isinstance(item, Scope) and is_open(item)
    look = look_of(item, opened=opened)
    name = shorten(span(item), _PORT if look == "port" else _LETTERS)
    detail = shorten(item.detail if isinstance(item, Leaf) else item.class_name, _LETTERS)
    count = f"× {item.count}" if item.count > 1 else ""
    box = Box(item, look, name, "" if detail == name else detail, count, _tip(item, heatmap, opened=opened))
    if isinstance(item, Scope) and opened:
        return _open(box, item, [place(part, is_open, heatmap) for part in item.items], root=root)
    return _single(box, heatmap)


def _tip(item: Item, heatmap: Heatmap, *, opened: bool) -> str:
    """The tooltip: the adapted layers of a box that is not open, and why its layers have no adapter."""
    if isinstance(item, Scope):
        lines = [f"{item.path or item.name}: {item.class_name}"]
        return "\n".join([*lines, *map(heatmap.line, () if opened else item.marks)])
    lines = [f"{item.target}: {item.detail or item.op}", *filter(None, [item.shape])]
    lines += [*map(heatmap.line, item.marks), *(f"{path} is trained in full" for path in item.trained)]
    return "\n".join([*lines, *(f"{layer.path} has no adapter: {layer.reason}" for layer in item.skipped)])


def _single(box: Box, heatmap: Heatmap) -> Box:
    item = box.item
    if box.look not in STACKED:
        wide = width(box.name, NAME) + (7 + width(box.detail, DETAIL) if box.detail else 0) + count_width(box.count)
        least, high = (60, 24) if box.look == "port" else (70, 29)
        return replace(box, size=Size(max(wide + 2 * _PAD, least), high))
    words, heat = heatmap.strip(item)
    strip, detail = "", box.detail
    if isinstance(item, Scope):
        detail += f" · {len(item.marks)} adapted" * bool(item.marks) + f" · {words}" * bool(words)
        detail += f" · {len(item.skipped)} not adapted" * bool(item.skipped)
        heat = ""
    elif not item.marks:
        strip = "same layer, called again"
    elif item.op == "eager":
        strip = f"r {item.rank} · d {item.width} · not traced"
    elif item.rank:
        strip = f"r {item.rank} · d {item.width}" + f" · {words}" * bool(words)
    else:
        strip, heat = "no active adapter", ""  # nothing is rotated
    name = width(box.name, NAME, bold=True) + count_width(box.count)
    wide = max(name, width(detail, DETAIL), width(strip, DETAIL, bold=True) + 12)
    cells = heatmap.cells(item, wide)
    size = Size(wide + 2 * _PAD, (STRIP if strip else 8) + 39 + cells.height)
    return replace(box, size=size, detail=detail, strip=strip, heat=heat, cells=cells)


def _open(box: Box, scope: Scope, parts: Sequence[Box], *, root: bool) -> Box:
    origins = _origins(scope)
    names = [shorten(name, _LETTERS) for name in origins if len(origins) > 1]
    ports = [Size(width(name, DETAIL) + 16, PORT) for name in names] or [Size(0, 0) for _ in origins]
    first, border = len(parts), len(parts) + len(ports)
    rows = [row + bool(ports) for row in scope_rows(scope)]
    rows += [0] * len(ports) + [max(rows) + 1] * bool(scope.outputs)
    sizes = [*(part.size for part in parts), *ports, Size(0, 0)][: len(rows)]
    edges = [*_drawn(scope, parts), *(Edge(output, border, 0) for output in scope.outputs)]
    inner = Layout(sizes, edges, rows, has_ports=bool(ports))
    left, top, wide, high = 0.0, 0.0, inner.width, inner.height
    if not root:
        title = width(box.name, NAME, bold=True) + 8 + width(box.detail, DETAIL) + count_width(box.count)
        wide = max(title, inner.width) + 2 * _PAD
        left, top = (wide - inner.width) / 2, HEADER + (0 if ports else 12)
        high = top + inner.height + (0 if scope.outputs else 12)
    lefts = [x - size.width / 2 for x, size in zip(inner.x, sizes, strict=True)]
    ends = [left + x - wide / 2 for x in inner.x[first:]]  # of the ports, and maybe of the border
    return replace(
        box,
        size=Size(wide, high, tuple(ends[: len(ports)]), ends[-1] if scope.outputs else 0.0),
        parts=tuple(replace(part, x=lefts[at], y=inner.top[at]) for at, part in enumerate(parts)),
        ports=tuple((name, lefts[first + at], ports[at].width) for at, name in enumerate(names)),
        routes=inner.routes,
        body=(left, top),
    )


def _drawn(scope: Scope, parts: Sequence[Box]) -> list[Edge]:
    """The edges between parts and ports, with one port for each origin of values, and one of a closed module."""
    shapes: dict[tuple[int, int, int], dict[str, None]] = {}
    for source, target, port, shape in scope.edges:
        start = source if source >= 0 else len(parts) + _origins(scope).index(scope.ports[~source])
        reader = parts[target]
        end = 0
        if isinstance(reader.item, Scope) and reader.parts is not None:
            end = _origins(reader.item).index(reader.item.ports[port])
        shapes.setdefault((start, target, end), {})[shape] = None
    return [Edge(*ends, " + ".join([*own][:1] + [str(len(own) - 1)] * (len(own) > 1))) for ends, own in shapes.items()]


def _origins(scope: Scope) -> list[str]:
    """The ports that are drawn: values from the same box or module share one."""
    return list(dict.fromkeys(scope.ports))


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
