"""Draw the items of a picture as SVG elements, from the inside out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

from hra_fx.reporting.words import shorten
from hra_fx.view.drawing import Drawing
from hra_fx.view.layout import Layout, Route, Size, rows_of
from hra_fx.view.opening import Opening
from hra_fx.view.theme import COLORS, width
from hra_fx.view.tree import Edge, Item, Leaf, Scope, span

_NAME, _DETAIL, _SHAPE = 12.5, 11.0, 9.5  # font sizes; the last one is that of the shapes of values
_LINE = 16.0  # height of a line of text
_CELL = 9.0  # height of a row of heat cells
_NARROWEST = 3.0  # width of a cell
_PAD = 14.0
_LETTERS = 38
_NOTHING = Size(0, 0)

#: The class of a box -> the colors of its frame, as roles of `theme.COLORS`.
_LOOKS = {
    "adapted_layer": ("violet-pale", "violet-line"),
    "trained": ("blue-pale", "blue-line"),
    "plain": ("card", "line"),
    "closed": ("module", "line"),
    "open": ("module", "line"),
    "port": ("port", "line"),
}


class Span(NamedTuple):
    """A part of a line of text."""

    text: str
    size: float = _NAME
    ink: str = "ink"
    bold: bool = False


def shape(parent: Element, tag: str, **attributes: str | float) -> Element:
    """Add an element. Numbers are rounded, roles become colors, and `_` in names becomes `-`."""
    texts = {
        name.rstrip("_").replace("_", "-"): COLORS.get(value, (value,))[0] if isinstance(value, str) else number(value)
        for name, value in attributes.items()
    }
    return SubElement(parent, tag, texts)


def number(value: float) -> str:
    """Format a coordinate with at most one decimal.

    >>> number(3.04), number(2.55)
    ('3', '2.5')
    """
    return f"{value:.1f}".removesuffix(".0")


def write(parent: Element, x: float, y: float, *spans: Span, anchor: str = "start") -> Element:
    """Add a line of text with its baseline at `y`."""
    line = shape(parent, "text", x=x, y=y, text_anchor=anchor)
    for at, part in enumerate(spans):
        look = {"font_weight": "600"} if part.bold else {}
        shape(line, "tspan", font_size=part.size, fill=part.ink, dx=8.0 * bool(at), **look).text = part.text
    return line


def line_width(spans: Sequence[Span]) -> float:
    """The width of a line of text."""
    return sum(width(part.text, part.size, bold=part.bold) + 8 for part in spans) - 8


@dataclass(frozen=True)
class Drawn:
    """A drawn item: its element, with the upper left corner at the origin, and its size."""

    element: Element
    size: Size

    def put(self, parent: Element, x: float, y: float) -> None:
        """Add the element at a position."""
        self.element.set("transform", f"translate({number(x)} {number(y)})")
        parent.append(self.element)


@dataclass(frozen=True)
class Pen:
    """Draws the items of one picture. `link` returns the address of the picture of a closed module, if it has one."""

    drawing: Drawing
    is_open: Opening
    link: Callable[[Scope], str] = lambda scope: ""

    def draw(self, item: Item, *, root: bool = False) -> Drawn:
        """Draw an item and everything inside it. The root does not have a frame."""
        group = Element("g")
        SubElement(group, "title").text = self._tip(item)
        if isinstance(item, Leaf):
            return self._leaf(group, item)
        if self.is_open(item):
            return self._open_module(group, item, root=root)
        if address := self.link(item):
            group.tag = "a"
            group.set("href", f"#{address}")
        words = [item.class_name, f"{len(item.marks)} adapted" * bool(item.marks), self.drawing.change(item.marks)]
        words += [f"{len(item.skipped)} not adapted" * bool(item.skipped)]
        lines = [[self._name(item, bold=True)], [Span(" · ".join(filter(None, words)), _DETAIL, "faint")]]
        return self._box(group, "closed", lines, item)

    def _tip(self, item: Item) -> str:
        """The tooltip: the adapted layers of a box that is not open, and why its layers have no adapter."""
        layers = [f"{path} · {self.drawing.change([path])}".removesuffix(" · ") for path in item.marks]
        if isinstance(item, Scope):
            return "\n".join([f"{item.path or item.name}: {item.class_name}", *layers * (not self.is_open(item))])
        lines = [f"{item.target}: {item.detail or item.kind}", *filter(None, [item.shape]), *layers]
        lines += (f"{path} is trained in full" for path in item.trained)
        return "\n".join([*lines, *(f"{layer.path} has no adapter: {layer.reason}" for layer in item.skipped)])

    def _name(self, item: Item, *, bold: bool = False) -> Span:
        return Span(shorten(span(item), _LETTERS), bold=bold)

    def _leaf(self, group: Element, leaf: Leaf) -> Drawn:
        name, detail = self._name(leaf).text, shorten(leaf.detail, _LETTERS)
        if leaf.kind != "adapted_layer":
            look = "port" if leaf.kind in ("input", "output") else "trained" if leaf.trained else "plain"
            details = [Span(detail, _DETAIL, "blue" if leaf.trained else "faint")] * (detail not in ("", name))
            return self._box(group, look, [[Span(name), *details]], leaf)
        words = f"r {leaf.rank} · d {leaf.width}" if leaf.rank else "no active adapter"
        if leaf.rank and (change := self.drawing.change(leaf.marks)):
            words += f" · {change}"
        last = words if leaf.marks else "same layer, called again"
        lines = [[Span(name, bold=True)], [Span(detail, _DETAIL, "faint")], [Span(last, _DETAIL, "violet", bold=True)]]
        return self._box(group, "adapted_layer", lines, leaf)

    def _box(self, group: Element, look: str, lines: Sequence[Sequence[Span]], item: Item | None) -> Drawn:
        """Draw a frame around lines of text, with a cell below them for each adapted layer.

        If a box represents several modules, each of them has a column of cells.
        """
        inner = max(map(line_width, lines))
        marks = item.marks if item and self.drawing.largest_change else ()
        fitting = int(inner / _NARROWEST)
        columns = item.count if item and 1 < item.count <= fitting else min(len(marks), fitting)
        cells = math.ceil(len(marks) / columns) * _CELL if marks else 0.0
        pad = 2.5 if look == "port" else 6.5
        size = Size(inner + 2 * _PAD, len(lines) * _LINE + 2 * pad + (cells and cells + 4))
        _frame(group, look, size)
        for at, spans in enumerate(lines):
            write(group, size.width / 2, pad + at * _LINE + 12.5, *spans, anchor="middle")
        for at, path in enumerate(marks):
            row, column = divmod(at, columns)
            x, y = _PAD + column * inner / columns, size.height - cells - pad + row * _CELL
            cell = shape(group, "rect", x=x, y=y, width=inner / columns, height=_CELL, stroke="card", class_="cell")
            cell.set("fill", COLORS[self.drawing.color(path)][0])
            SubElement(cell, "title").text = f"{path} · {self.drawing.change([path])}"
        if item and isinstance(item, Leaf) and item.skipped:
            skipped_marker(group, 7.5, size.height / 2, targeted=any(layer.targeted for layer in item.skipped))
        return Drawn(group, size)

    def _open_module(self, group: Element, scope: Scope, *, root: bool) -> Drawn:
        """Draw the frame and the title of a module, and what is in it."""
        body = self._inside(scope, "card" if root else "module")
        if root:
            group.set("class", "root")
            body.put(group, 0, 0)
            return Drawn(group, body.size)
        title = [self._name(scope, bold=True), Span(shorten(scope.class_name, _LETTERS), _DETAIL, "faint")]
        wide = max(line_width(title), body.size.width) + 2 * _PAD
        top = 27.0 + 12 * (not scope.ports)
        size = replace(body.size, width=wide, height=top + body.size.height + 12 * (not scope.outputs))
        _frame(group, "open", size)
        write(group, 13, 18, *title)
        body.put(group, (wide - body.size.width) / 2, top)
        return Drawn(group, size)

    def _inside(self, scope: Scope, paper: str) -> Drawn:
        """Draw the items of a module with the edges between them, its ports in the first row, and its end."""
        origins = list(dict.fromkeys(scope.ports))  # values from the same box or module share a port
        ports = [self._port(name if len(origins) > 1 else "") for name in origins]
        end = [Drawn(Element("g"), _NOTHING)] * bool(scope.outputs)
        first, boxes = len(ports), [*ports, *map(self.draw, scope.items), *end]
        rows = [0] * first + [row + bool(ports) for row in rows_of(scope)]
        rows += [max(rows) + 1] * len(end)
        edges, shapes = dict[Edge, None](), dict[int, dict[str, None]]()
        for source, target, port, text in scope.edges:
            start = source + first if source >= 0 else origins.index(scope.ports[~source])
            size = boxes[target + first].size
            edges[Edge(start, target + first, size.enter.index(size.entry(port)))] = None
            if text:
                shapes.setdefault(start, {})[text] = None
        edges |= dict.fromkeys(Edge(output + first, len(boxes) - 1, 0) for output in scope.outputs)
        layout = Layout([box.size for box in boxes], list(edges), rows)
        body = Element("g")
        _draw_edges(body, layout.routes, range(first, first + len(scope.items)), shapes, paper)
        for box, x, y in zip(boxes, layout.x, layout.top, strict=True):
            box.put(body, x - box.size.width / 2, y)
        ends = [x - layout.width / 2 for x in layout.x]
        enter = tuple(ends[origins.index(name)] for name in scope.ports) or (0.0,)
        return Drawn(body, Size(layout.width, layout.height, enter, ends[-1] if end else 0.0))

    def _port(self, name: str) -> Drawn:
        """Draw the name of the box or module that a value comes from, if there are several."""
        group = Element("g")
        return self._box(group, "port", [[Span(name, _DETAIL, "faint")]], None) if name else Drawn(group, _NOTHING)


def _frame(group: Element, look: str, size: Size) -> None:
    fill, line = _LOOKS[look]
    group.set("class", look)
    radius = size.height / 2 if look == "port" else 6.0
    shape(group, "rect", width=size.width, height=size.height, rx=radius, fill=fill, stroke=line, class_="frame")


def skipped_marker(parent: Element, x: float, y: float, *, targeted: bool) -> None:
    """The marker of a layer without an adapter: gray, or red if it should have one."""
    look = {"stroke": "red-line", "class_": "refused"} if targeted else {"stroke": "edge", "class_": "skipped"}
    shape(parent, "circle", cx=x, cy=y, r=3.5, fill="card", stroke_width=1.7, **look)


def _draw_edges(
    body: Element, routes: Sequence[Route], parts: range, shapes: Mapping[int, Iterable[str]], paper: str
) -> None:
    """Draw edges, with arrows at the parts, and beside their start the shapes of the values."""
    starts: dict[int, list[Route]] = {}
    for route in routes:
        starts.setdefault(route.edge.source, []).append(route)
        shape(body, "path", d=path_of(route), fill="none", stroke="edge", stroke_width=1.3, class_="edge")
        if route.edge.target in parts:
            x, _, y = route.pieces[-1]
            shape(body, "path", d=f"M{number(x)} {number(y)}l-3.5 -7h7z", fill="edge")
    for source in sorted(starts.keys() & shapes.keys() & {*parts}):
        x, _, y = starts[source][0].pieces[0]
        is_left = sum(route.pieces[1][0] - x for route in starts[source]) > 8  # the side to which edges do not turn
        at, anchor = (x - 5, "end") if is_left else (x + 5, "start")
        label = write(body, at, y + 11, Span(", ".join(shapes[source]), _SHAPE, "faint"), anchor=anchor)
        label.attrib.update({"class": "shape", "stroke": COLORS[paper][0], "stroke-width": "3"})
        label.set("paint-order", "stroke")


def path_of(route: Route) -> str:
    """The path data of an edge: vertical next to boxes, and curved in the gaps between rows."""
    x, begin, end = route.pieces[0]
    words = [f"M{number(x)} {number(begin)}V{number(end)}"]
    for (x0, _, y0), (x1, y1, y2) in pairwise(route.pieces):
        bend = number((y0 + y1) / 2)
        words.append(f"C{number(x0)} {bend} {number(x1)} {bend} {number(x1)} {number(y1)}V{number(y2)}")
    return "".join(words)
