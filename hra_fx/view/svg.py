"""Draw placed boxes as SVG elements: shapes and text. Colors are roles of a theme; see `theme.colored`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias
from xml.etree.ElementTree import Element, SubElement

from hra_fx.view.heatmap import CELL
from hra_fx.view.layout import DETAIL, NAME, PORT, STACKED, STRIP, Box, Route, count_width
from hra_fx.view.theme import ink_on, width

FONT = "'Segoe UI', Roboto, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"

_SHAPE = 9.5  # font size of the shapes of values


class Look(NamedTuple):
    """Colors of a box, as roles of `theme.COLORS`; its description in the legend, and the dashes of its border."""

    fill: str
    line: str
    ink: str
    words: str = ""
    dashes: str = ""


LOOKS = {
    "adapted_layer": Look("card", "violet-line", "ink", "adapted layer"),
    "trained": Look("blue-pale", "blue-line", "blue", "trained in full"),
    "plain": Look("card", "line", "ink", "other operation"),
    "closed": Look("module", "line", "ink", "module"),
    "traced": Look("module", "line", "ink", "module"),
    "untraced": Look("untraced", "amber-line", "ink", "module that is not traced, without edges", "4 3"),
    "eager": Look("amber-pale", "amber-line", "amber", "not traced, without adapters", "4 3"),
    "port": Look("port", "line", "ink"),
}
#: A function that gets the element of each box, with what it shows.
Mark: TypeAlias = Callable[[Element, Box], None]


def number(value: float) -> str:
    """Format a coordinate with at most one decimal.

    >>> number(3.04), number(2.55)
    ('3', '2.5')
    """
    return f"{value:.1f}".removesuffix(".0")


def shape(parent: Element, tag: str, **attributes: str | float) -> Element:
    """Add an element. Numbers are rounded, and `_` in names becomes `-`."""
    texts = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else number(value)
        for name, value in attributes.items()
    }
    return SubElement(parent, tag, texts)


def write(
    parent: Element, x: float, y: float, text: str, size: float, fill: str, *, bold: bool = False, anchor: str = "start"
) -> Element:
    """Add one line of text with its baseline at `y`."""
    element = shape(parent, "text", x=x, y=y, font_size=size, fill=fill)
    if bold:
        element.set("font-weight", "600")
    if anchor != "start":
        element.set("text-anchor", anchor)
    element.text = text
    return element


def draw(parent: Element, box: Box, x: float, y: float, marked: Mark | None = None, *, root: bool = False) -> None:
    """Draw a box and everything inside it. The root does not have a frame. `marked` gets the element of each box."""
    item = box.item
    group = shape(parent, "g", class_="root" if root else box.look)
    SubElement(group, "title").text = box.tip
    if marked:
        marked(group, box)
    if box.parts is not None:
        if not root:
            _draw_frame(group, box, x, y)
        _draw_inside(group, box, x + box.body[0], y + box.body[1], marked)
        return
    _draw_single(group, box, x, y)
    if marked and box.look == "closed":  # it leads to another picture
        shape(group, "path", d=f"M{number(x + 7)} {number(y + 7)}l5 3.5l-5 3.5z", class_="opens")
    if item.skipped:
        middle = 24 if box.look in STACKED else box.size.height / 2
        skipped_marker(group, x + 7.5, y + middle, refused=any(layer.targeted for layer in item.skipped))


def skipped_marker(parent: Element, x: float, y: float, *, refused: bool) -> None:
    """The marker of a layer without an adapter: gray, or red if it should have one."""
    look = {"stroke": "red-line", "class_": "refused"} if refused else {"stroke": "edge", "class_": "skipped"}
    shape(parent, "circle", cx=x, cy=y, r=3.5, fill="card", stroke_width=1.7, **look)


def _outline(group: Element, box: Box, x: float, y: float, radius: float, kind: str = "frame") -> None:
    look, wide, high = LOOKS[box.look], box.size.width, box.size.height
    frame = shape(group, "rect", x=x, y=y, width=wide, height=high, rx=radius, fill=look.fill, stroke=look.line)
    frame.set("class", kind)
    if look.dashes:
        frame.set("stroke-dasharray", look.dashes)


def _draw_single(group: Element, box: Box, x: float, y: float) -> None:
    """Draw a box with a name, and a strip on top for an adapted layer; or a stack for several modules."""
    look, wide, high = box.look, box.size.width, box.size.height
    ink = LOOKS[look].ink
    if look == "closed" and box.count:
        _outline(group, box, x + 4, y + 4, 6, "under")
    _outline(group, box, x, y, high / 2 if look == "port" else 6)
    middle = x + (wide - count_width(box.count)) / 2
    faint = "amber" if look == "eager" else "faint"
    if look not in STACKED:
        name = write(group, middle, y + high / 2 + 4.5, box.name, NAME, ink, anchor="middle")
        shape(name, "tspan", dx=7.0 * bool(box.detail), font_size=DETAIL, fill=faint).text = box.detail
        _badge(group, box, x + wide - 8, y + 6)
        return
    top = y + (STRIP if box.strip else 5)
    if box.strip:
        _draw_strip(group, box, x, y)
    write(group, middle, top + 16, box.name, NAME, ink, bold=True, anchor="middle")
    write(group, x + wide / 2, top + 31.5, box.detail, DETAIL, faint, anchor="middle")
    _badge(group, box, x + wide - 8, top + 4)
    _draw_cells(group, box, x + 8, y + high - box.cells.height)


def _draw_strip(group: Element, box: Box, x: float, y: float) -> None:
    """Draw the adapter as a strip on top of its layer."""
    wide, corner = box.size.width, STRIP - 6
    top = f"M{number(x)} {number(y + STRIP)}v{number(-corner)}a6 6 0 0 1 6 -6h{number(wide - 12)}"
    top += f"a6 6 0 0 1 6 6v{number(corner)}z"
    shape(group, "path", d=top, fill=box.heat or "violet-pale", stroke="violet-line", class_="strip")
    ink = ink_on(box.heat) if box.heat else "violet"
    write(group, x + wide / 2, y + 13.5, box.strip, DETAIL, ink, bold=True, anchor="middle")


def _draw_cells(group: Element, box: Box, x: float, y: float) -> None:
    """Draw a cell for every adapted layer in the box, below its text."""
    cells, room = box.cells, box.size.width - 16
    wide = room / cells.columns
    for index, (fill, tip) in enumerate(zip(cells.colors, cells.tips, strict=True)):
        row, column = divmod(index, cells.columns)
        cell = shape(
            group, "rect", x=x + column * wide, y=y + row * CELL, width=wide, height=CELL, fill=fill, class_="cell"
        )
        if wide > 6:
            cell.attrib.update(stroke="card")
        SubElement(cell, "title").text = tip
    if cells.colors:
        shape(group, "rect", x=x, y=y, width=room, height=cells.height - 5, fill="none", stroke="edge")


def _badge(group: Element, box: Box, right: float, y: float) -> None:
    """Draw the number of modules that a box represents."""
    if box.count:
        wide = width(box.count, DETAIL, bold=True) + 10
        frame = {"fill": "card", "stroke": "ink", "class_": "badge"}
        shape(group, "rect", x=right - wide, y=y, width=wide, height=16.0, rx=8.0, **frame)
        write(group, right - wide / 2, y + 12, box.count, DETAIL, "ink", bold=True, anchor="middle")


def _draw_frame(group: Element, box: Box, x: float, y: float) -> None:
    """Draw the frame and the title of an open module."""
    _outline(group, box, x, y, 8)
    title = write(group, x + 13, y + 18, box.name, NAME, "ink", bold=True)
    shape(title, "tspan", dx=8.0, font_size=DETAIL, fill="faint", font_weight="400").text = box.detail
    _badge(group, box, x + box.size.width - 8, y + 6)


def _draw_inside(group: Element, box: Box, left: float, top: float, marked: Mark | None) -> None:
    """Draw the edges of an open module, then its ports, and the boxes on top of the edges."""
    parts, starts = box.parts or (), dict[int, list[Route]]()
    for route in box.routes:
        line = path_of(route, left, top)
        edge = shape(group, "path", d=line, fill="none", stroke="edge", stroke_width=1.3, class_="edge")
        if route.edge.target < len(parts):
            edge.set("marker-end", "url(#//arrow)")
            starts.setdefault(route.edge.source, []).append(route)
    for name, x, wide in box.ports:
        frame = {"fill": "port", "stroke": "line", "class_": "entry"}
        shape(group, "rect", x=left + x, y=top, width=wide, height=PORT, rx=PORT / 2, **frame)
        write(group, left + x + wide / 2, top + 12.5, name, DETAIL, "faint", anchor="middle").set("class", "entry")
    paper = LOOKS[box.look].fill if box.body[1] else "card"
    for source, routes in starts.items():
        for place in _shapes(routes, left, top) if source < len(parts) else ():
            text = write(group, **place)
            text.attrib.update({"class": "shape", "stroke": paper, "stroke-width": "3", "paint-order": "stroke"})
    for part in parts:
        draw(group, part, left + part.x, top + part.y, marked)


def _shapes(routes: list[Route], left: float, top: float) -> Iterator[dict[str, Any]]:
    """The shape of the value on the edges of a box, beside their start, on the side that they do not turn to.

    If the edges carry values of several shapes, each shape is beside the arrow of its edge.
    """
    look = {"size": _SHAPE, "fill": "faint"}
    shapes = dict.fromkeys(route.edge.shape for route in routes)
    if len(shapes) == 1:
        x, _, y = routes[0].pieces[0]
        is_left = sum(route.pieces[1][0] - x for route in routes) > 8
        end = {"x": left + x - 5, "anchor": "end"} if is_left else {"x": left + x + 5}
        yield {"y": top + y + 11, "text": routes[0].edge.shape, **end, **look}
        return
    for route in routes:
        x, y, _ = route.pieces[-1]
        yield {"x": left + x + 5, "y": top + y - 4, "text": route.edge.shape, **look}


def path_of(route: Route, left: float, top: float) -> str:
    """The path data of an edge: vertical next to boxes, and curved in the gaps between rows.

    Segments of length zero are avoided, because some viewers draw the arrow at the end of such a segment to the right.
    """
    x, begin, end = route.pieces[0]
    words, y = [f"M{number(left + x)} {number(top + begin)}"], number(top + begin)
    y = _down(words, y, number(top + end))
    for (x0, _, y0), (x1, y1, y2) in pairwise(route.pieces):
        bend, there, y = number(top + (y0 + y1) / 2), number(left + x1), number(top + y1)
        words.append(f"C{number(left + x0)} {bend} {there} {bend} {there} {y}")
        y = _down(words, y, number(top + y2))
    return "".join(words)


def _down(words: list[str], start: str, end: str) -> str:
    """Add a vertical line to a y position, unless the path is already there."""
    if start != end:
        words.append(f"V{end}")
    return end
