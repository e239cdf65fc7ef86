"""Placed boxes as SVG elements: shapes and text. Colors are roles of a theme; see `theme.colored`."""

from __future__ import annotations

from itertools import pairwise
from xml.etree.ElementTree import Element, SubElement

from hra_fx.reporting.colormap import ink_on
from hra_fx.view.boxes import DETAIL, NAME, STRIP, Box, count_width
from hra_fx.view.heatmap import CELL
from hra_fx.view.layout import Route
from hra_fx.view.text import width

FONT = "'Segoe UI', Roboto, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"

#: Fill, border and text color of each look, as roles of `theme.COLORS`.
LOOKS = {
    "port": ("port", "port-line", "ink"),
    "adapted_layer": ("card", "violet-line", "ink"),
    "plain": ("card", "box-line", "ink"),
    "eager": ("amber-pale", "amber-line", "amber"),
    "trained": ("blue-pale", "blue-line", "blue"),
    "closed": ("module", "module-line", "ink"),
}

#: Fill, border and dashes of modules that show their inside.
FRAMES = {"traced": ("module", "module-line", ""), "untraced": ("untraced", "amber-line", "4 3")}


def number(value: float) -> str:
    """A coordinate with at most one decimal.

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
    """Add one line of text with its base line at `y`."""
    element = shape(parent, "text", x=x, y=y, font_size=size, fill=fill)
    if bold:
        element.set("font-weight", "600")
    if anchor != "start":
        element.set("text-anchor", anchor)
    element.text = text
    return element


def draw(parent: Element, box: Box, x: float, y: float) -> None:
    """Draw a box and all inside it.

    Args:
        parent: the element that gets the shapes.
        box: the box.
        x: its left edge.
        y: its upper edge.
    """
    group = shape(parent, "g", class_=box.look)
    SubElement(group, "title").text = box.tip
    if box.look not in LOOKS:
        _draw_open(group, box, x, y)
        return
    group.set("data-adapted", str(box.adapted))
    if box.look == "adapted_layer":
        _draw_adapted(group, box, x, y)
    elif box.look == "closed":
        _draw_closed(group, box, x, y)
    else:
        _draw_line(group, box, x, y)
    if box.skipped:
        skipped_marker(group, x, y, refused=box.refused)


def skipped_marker(parent: Element, x: float, y: float, *, refused: bool) -> None:
    """The marker of a layer without an adapter: gray, or red if it should have one."""
    look = {"stroke": "red-line", "class_": "refused"} if refused else {"stroke": "skipped", "class_": "skipped"}
    shape(parent, "circle", cx=x, cy=y, r=5.0, fill="card", stroke_width=2.0, **look)


def _draw_cells(group: Element, box: Box, x: float, y: float) -> None:
    """A cell for every adapted layer in the box, below its text."""
    cells = box.cells
    if not cells.colors:
        return
    wide = (box.size.width - 16) / cells.columns
    top = y + box.size.height - cells.height
    for index, (fill, tip) in enumerate(zip(cells.colors, cells.tips, strict=True)):
        row, column = divmod(index, cells.columns)
        cell = shape(group, "rect", x=x + 8 + column * wide, y=top + row * CELL, width=wide, height=CELL, fill=fill)
        if wide > 6:
            cell.attrib.update(stroke="card")
        SubElement(cell, "title").text = tip
    high = cells.height - 5
    shape(group, "rect", x=x + 8, y=top, width=box.size.width - 16, height=high, fill="none", stroke="edge")


def _frame(group: Element, box: Box, x: float, y: float, radius: float) -> str:
    """The outline of a single box; returns the color of its text."""
    fill, line, ink = LOOKS[box.look]
    _outline(group, box, x, y, radius, fill, line, "4 3" if box.look == "eager" else "")
    return ink


def _outline(
    group: Element, box: Box, x: float, y: float, radius: float, fill: str, line: str, dashes: str = ""
) -> None:
    wide, high = box.size.width, box.size.height
    frame = shape(group, "rect", x=x, y=y, width=wide, height=high, rx=radius, fill=fill, stroke=line)
    if dashes:
        frame.set("stroke-dasharray", dashes)


def _draw_line(group: Element, box: Box, x: float, y: float) -> None:
    """A box with one line: name, then detail."""
    ink = _frame(group, box, x, y, box.size.height / 2 if box.look == "port" else 5)
    base = y + box.size.height / 2 + 4.5
    middle = x + (box.size.width - count_width(box.count)) / 2
    line = write(group, middle, base, box.name, NAME, ink, anchor="middle")
    if box.detail:
        part = shape(line, "tspan", dx=7.0, font_size=DETAIL, fill="faint" if box.look != "eager" else "amber")
        part.text = box.detail
    _badge(group, box, x + box.size.width - 8, y + 5, "violet" if box.look == "adapted_layer" else "faint")


def _draw_adapted(group: Element, box: Box, x: float, y: float) -> None:
    """The adapter as a strip on top of its layer."""
    wide = box.size.width
    _frame(group, box, x, y, 6)
    corner = STRIP - 6
    top = f"M{number(x)} {number(y + STRIP)}v{number(-corner)}a6 6 0 0 1 6 -6h{number(wide - 12)}"
    top += f"a6 6 0 0 1 6 6v{number(corner)}z"
    shape(group, "path", d=top, fill=box.heat or "violet-pale", stroke="violet-line")
    ink = ink_on(box.heat) if box.heat else "violet"
    write(group, x + wide / 2, y + 13.5, box.strip, DETAIL, ink, bold=True, anchor="middle")
    middle = x + (wide - count_width(box.count)) / 2
    write(group, middle, y + STRIP + 16, box.name, NAME, "ink", bold=True, anchor="middle")
    write(group, x + wide / 2, y + STRIP + 31.5, box.detail, DETAIL, "faint", anchor="middle")
    _badge(group, box, x + wide - 8, y + STRIP + 4, "violet")
    _draw_cells(group, box, x, y)


def _draw_closed(group: Element, box: Box, x: float, y: float) -> None:
    """A closed module: a stack if it stands for several."""
    fill, line, _ = LOOKS["closed"]
    if box.count:
        _outline(group, box, x + 4, y + 4, 6, fill, line)
    ink = _frame(group, box, x, y, 6)
    write(group, x + 13, y + 20, box.name, NAME, ink, bold=True)
    write(group, x + 13, y + 36.5, box.detail, DETAIL, ink)
    _badge(group, box, x + box.size.width - 8, y + 8, "ink")
    _draw_cells(group, box, x, y)


def _badge(group: Element, box: Box, right: float, y: float, color: str) -> None:
    if not box.count:
        return
    wide = width(box.count, DETAIL, bold=True) + 10
    shape(group, "rect", x=right - wide, y=y, width=wide, height=16.0, rx=8.0, fill="card", stroke=color)
    write(group, right - wide / 2, y + 12, box.count, DETAIL, color, bold=True, anchor="middle")


def _draw_open(group: Element, box: Box, x: float, y: float) -> None:
    if box.look in FRAMES:
        _outline(group, box, x, y, 8, *FRAMES[box.look])
        title = write(group, x + 13, y + 18, box.name, NAME, "ink", bold=True)
        part = shape(title, "tspan", dx=8.0, font_size=DETAIL, fill="faint", font_weight="400")
        part.text = box.detail
        _badge(group, box, x + box.size.width - 8, y + 6, "ink")
    left, top = x + box.body[0], y + box.body[1]
    drawn: set[str] = set()
    for route in box.routes:
        line = path_of(route, left, top)
        if line not in drawn:
            drawn.add(line)
            edge = shape(group, "path", d=line, fill="none", stroke="edge", stroke_width=1.3, class_="edge")
            if route.target is not None:
                edge.set("marker-end", "url(#arrow)")
    for part_box in box.parts:
        draw(group, part_box, left + part_box.x, top + part_box.y)


def path_of(route: Route, left: float, top: float) -> str:
    """The path data of an edge: vertical beside boxes, curved in the gaps between layers.

    No segment has length zero, because some viewers draw the arrow at the end of such a segment to the right.
    """
    x, begin, end = route.pieces[0]
    words, y = [f"M{number(left + x)} {number(top + begin)}"], number(top + begin)
    y = _down(words, y, number(top + end))
    for (x0, _, y0), (x1, y1, y2) in pairwise(route.pieces):
        if x0 == x1:
            y = _down(words, y, number(top + y1))
        else:
            bend, there, y = number(top + (y0 + y1) / 2), number(left + x1), number(top + y1)
            words.append(f"C{number(left + x0)} {bend} {there} {bend} {there} {y}")
        y = _down(words, y, number(top + y2))
    return "".join(words)


def _down(words: list[str], start: str, end: str) -> str:
    """Add a vertical line to a y position, unless it is reached."""
    if start != end:
        words.append(f"V{end}")
    return end
