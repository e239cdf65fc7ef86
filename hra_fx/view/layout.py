"""Layout: the text, the size and the position of every box, in rows from top to bottom.

An edge to the next row is a curve between the rows. A longer edge passes the rows between on their right side, so that
no edge crosses a box. Long edges from the same source share their path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx

from hra_fx.reporting.heat import shorten
from hra_fx.view.heatmap import NO_CELLS, Cells, Heatmap
from hra_fx.view.opening import Block
from hra_fx.view.theme import width
from hra_fx.view.tree import Item, Leaf, Scope, notes, span

NAME, DETAIL = 12.5, 11.0  # font sizes
STRIP = 19.0  # height of the adapter strip on top of its layer
HEADER = 27.0  # height of an open scope's title
#: The looks of single boxes with the detail below the name; in other boxes, it is next to the name.
STACKED = ("adapted_layer", "closed")
_PAD = 14.0
_LETTERS, _PORT = 34, 48
_LINES = 20  # of notes in a tooltip
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


class Layout:
    """Boxes in rows (by default those of `rows_of`), so that every edge points down.

    `inputs` get an edge from the upper border, and `outputs` one to the lower border. The borders are boxes of size 0,
    which are alone in the first and the last row.

    Attributes:
        width: of all boxes and edges.
        height: of all rows.
        corners: the upper left corner of each box.
        routes: the edges: those from the upper border, `edges`, and those to the lower border.
        enter: the x at which edges leave the upper border.
        leave: the x at which edges enter the lower border.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        edges: Sequence[tuple[int, int]],
        inputs: Sequence[int] = (),
        outputs: Sequence[int] = (),
        rows: Sequence[int] | None = None,
    ) -> None:
        """Place all boxes."""
        rows = rows_of(len(sizes), edges, inputs) if rows is None else rows
        self._upper, self._lower = len(sizes), len(sizes) + 1
        self.sizes = [*sizes, Size(0, 0), Size(0, 0)]
        links = [(self._upper, box) for box in inputs] + list(edges) + [(box, self._lower) for box in outputs]
        self.sources: list[list[int]] = [[] for _ in self.sizes]
        for source, target in links:
            self.sources[target].append(source)
        self.row = [row + 1 for row in rows] + [0, max(rows, default=-1) + 2]
        self.rows: list[list[int]] = [[] for _ in range(self.row[self._lower] + 1)]
        for box, row in enumerate(self.row):
            self.rows[row].append(box)
        self._place_all(inputs, outputs)
        self.lanes = self._lanes(links)
        left = min((self.x[box] - self.sizes[box].width / 2 for box in range(len(sizes))), default=0.0)
        right = max([*map(self._right, range(len(sizes))), *(x + 1 for x in self.lanes.values())], default=0.0)
        self.width, self.height = right - left, self.bottoms[-1]
        self.corners = [(self.x[box] - size.width / 2 - left, self._top(box)) for box, size in enumerate(sizes)]
        ends = self._ends()
        self.routes = tuple(self._route(source, target, ends[source, target], left) for source, target in links)
        self.enter, self.leave = self.x[self._upper] - left, self.x[self._lower] - left

    def _place_all(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Set the x of each box, and the top and the bottom of each row."""
        self.x = [0.0] * len(self.sizes)
        for boxes in self.rows[1:]:
            self._place(boxes)
        entries = [self.x[box] + self.sizes[box].enter for box in inputs if self.row[box] == 1]
        self.x[self._upper] = sum(entries) / len(entries) if entries else 0.0
        self.tops, self.bottoms, y = [0.0], [0.0], GAP_Y * bool(inputs)
        for boxes in self.rows[1:-1]:
            self.tops.append(y)
            self.bottoms.append(y + max((self.sizes[box].height for box in boxes), default=0))
            y = self.bottoms[-1] + GAP_Y
        self.tops.append(y if outputs else self.bottoms[-1])
        self.bottoms.append(self.tops[-1])

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

    def _lanes(self, links: Sequence[tuple[int, int]]) -> dict[int, float]:
        """Source -> x of its long edges, next to the rows that they pass. Shorter edges are closer to the boxes."""
        spans: dict[int, range] = {}
        for source, target in links:
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

    def _route(self, source: int, target: int, end: float, left: float) -> Route:
        above, below = self.row[source], self.row[target]
        begin = self._top(source) + self.sizes[source].height
        pieces = [(self.x[source] + self.sizes[source].leave, begin, self.bottoms[above])]
        if below - above > 1:
            pieces.append((self.lanes[source], self.tops[above + 1], self.bottoms[below - 1]))
        pieces.append((end, self.tops[below], self._top(target)))
        shifted = tuple((x - left, start, stop) for x, start, stop in pieces)
        return Route(None if source == self._upper else source, None if target == self._lower else target, shifted)

    def _start(self, source: int, target: int) -> float:
        """The x from which an edge comes to its target."""
        is_long = self.row[target] - self.row[source] > 1
        return self.lanes[source] if is_long else self.x[source] + self.sizes[source].leave

    def _ends(self) -> dict[tuple[int, int], float]:
        """The x at which each edge enters: the straightest edge at the entry, others on the side they come from."""
        ends: dict[tuple[int, int], float] = {}
        for target, sources in enumerate(self.sources):
            entry = self.x[target] + self.sizes[target].enter
            coming = sorted((self._start(source, target), source) for source in sources)
            straight = min(range(len(coming)), key=lambda place: abs(coming[place][0] - entry), default=0)
            room = max(self.sizes[target].width / 2 - abs(self.sizes[target].enter) - 10, 0.0)
            step = min(16.0, room / max(straight, len(coming) - 1 - straight, 1))
            ends.update(
                ((source, target), entry + (place - straight) * step) for place, (_, source) in enumerate(coming)
            )
        return ends


@dataclass(frozen=True)
class Box:
    """A placed block. `x` and `y` are the position of its upper left corner in its parent."""

    block: Block
    size: Size
    name: str
    detail: str
    count: str  # "× 6" for six modules
    tip: str  # the tooltip; empty for the page, which writes its own tooltips
    strip: str = ""  # the text of the adapter
    heat: str = ""  # the color of the strip, if a heatmap is shown
    cells: Cells = NO_CELLS
    x: float = 0.0
    y: float = 0.0
    parts: tuple[Box, ...] = ()
    routes: tuple[Route, ...] = ()
    body: tuple[float, float] = (0.0, 0.0)  # the position of the inside


def place(block: Block, heatmap: Heatmap, *, root: bool = False) -> Box:
    """Compute the size of a block, and place everything inside it. The root does not have a border or a title."""
    item = block.item
    name = shorten(span(item), _PORT if block.look == "port" else _LETTERS)
    detail = shorten(item.detail if isinstance(item, Leaf) else item.class_name, _LETTERS)
    count = f"× {item.count}" if item.count > 1 else ""
    tip = "" if heatmap.is_live else _tip(item, heatmap)
    box = Box(block, Size(0, 0), name, "" if detail == name else detail, count, tip)
    return _single(box, heatmap) if block.parts is None else _open(box, block.parts, heatmap, root=root)


def _tip(item: Item, heatmap: Heatmap) -> str:
    """The tooltip: all adapted layers, and why other layers have no adapter."""
    if isinstance(item, Leaf):
        lines = [f"{item.target}: {item.detail or item.op}", *filter(None, [item.shape])]
    else:
        lines = [f"{item.path or item.name}: {item.class_name}"]
    more = notes(item)
    cut = [f"… and {len(more) - _LINES} more"] if len(more) > _LINES else []
    return "\n".join([*lines, *map(heatmap.line, item.marks), *more[:_LINES], *cut])


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
    cells = heatmap.cells(item, wide) if look == "closed" or len(item.marks) > 1 else NO_CELLS
    size = Size(wide + 2 * _PAD, (STRIP if strip else 8) + 39 + cells.height)
    heat, strip = heat if strip else "", strip + value * (not heatmap.is_live)
    return replace(box, size=size, detail=detail, strip=strip, heat=heat, cells=cells)


def _open(box: Box, blocks: tuple[Block, ...], heatmap: Heatmap, *, root: bool) -> Box:
    scope = box.block.item
    assert isinstance(scope, Scope)  # only scopes have parts
    parts = [place(block, heatmap) for block in blocks]
    sizes = [part.size for part in parts]
    inner = Layout(sizes, scope.edges, scope.inputs, scope.outputs, scope_rows(scope))
    left, top, wide, high = 0.0, 0.0, inner.width, inner.height
    if not root:
        title = width(box.name, NAME, bold=True) + 8 + width(box.detail, DETAIL) + count_width(box.count)
        wide = max(title, inner.width) + 2 * _PAD
        left, top = (wide - inner.width) / 2, HEADER + (0 if scope.inputs else 12)
        high = top + inner.height + (0 if scope.outputs else 12)
    return replace(
        box,
        size=Size(wide, high, left + inner.enter - wide / 2, left + inner.leave - wide / 2),
        parts=tuple(replace(part, x=x, y=y) for part, (x, y) in zip(parts, inner.corners, strict=True)),
        routes=inner.routes,
        body=(left, top),
    )


def scope_rows(scope: Scope) -> list[int]:
    """The row of every item. In a traced scope, edges determine it; otherwise modules are below each other in order."""
    if not scope.eager:
        return rows_of(len(scope.items), scope.edges, scope.inputs)
    rows = [0]
    for index in range(1, len(scope.items)):
        alone = any(isinstance(item, Scope) for item in scope.items[index - 1 : index + 1])
        rows.append(rows[-1] + (alone or rows.count(rows[-1]) >= PER_ROW))
    return rows


def count_width(count: str) -> float:
    """The width that the number of modules takes in a box."""
    return width(count, DETAIL, bold=True) + 22 if count else 0.0
