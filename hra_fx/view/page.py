"""The SVG picture: title, legend, and the panels packed into columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from hra_fx.view.boxes import Box, place
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.legend import LINE, entries, placed
from hra_fx.view.options import Options
from hra_fx.view.panels import Panel, opened, plan
from hra_fx.view.svg import FONT, draw, shape, write
from hra_fx.view.text import clean, shorten, width
from hra_fx.view.theme import Theme, colored

_MARGIN, _GAP, _INSET = 32.0, 20.0, 24.0
_TOP = 88.0  # y of the legend
_NARROWEST, _WIDEST, _ASPECT = 560.0, 1680.0, 1.4
_NAMES = 40  # characters for the names of blocks above a panel


@dataclass(frozen=True)
class _Sheet:
    panel: Panel
    box: Box
    title: str
    captions: tuple[str, ...]

    @property
    def width(self) -> float:
        words = max([width(self.title, 14, bold=True) + 30, *(width(note, 11) for note in self.captions)])
        return max(self.box.size.width, words) + 2 * _INSET

    @property
    def height(self) -> float:
        return self.box.size.height + self.caption + _INSET

    @property
    def caption(self) -> float:
        return (48 if self.title else 18) + 15.0 * len(self.captions)


def render(drawing: Drawing, options: Options) -> str:
    """An SVG file that shows a model, or a part of it.

    Without a depth, it fits a page: an overview, and panels for blocks that repeat.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    tree = drawing.tree()
    panels = plan(tree) if options.depth is None else [opened(tree, options.depth, options.focus or "")]
    theme = options.theme or "light"
    return page(panels, drawing, heatmap_of(drawing, options.heat, theme), theme)


def page(panels: Sequence[Panel], drawing: Drawing, heatmap: Heatmap, theme: Theme = "light") -> str:
    """An SVG file, with the same bytes for the same panels.

    Args:
        panels: what is drawn, the overview first.
        drawing: what the panels are of, for the words above them.
        heatmap: the colors of adapted layers.
        theme: the colors of everything else.
    """
    sheets = [_sheet(panel, heatmap, alone=len(panels) == 1) for panel in panels]
    places, wide, high = _packed(sheets)
    wide = max(wide, _NARROWEST, width(drawing.facts, 13) + 2 * _MARGIN)
    boxes = [box for sheet in sheets for box in _all(sheet.box)]
    legend = placed(entries(boxes, heatmap, len(drawing.skipped), len(drawing.refused)), wide - 2 * _MARGIN)
    top = _TOP + LINE * (1 + max((line for *_, line in legend), default=-1)) + 14
    high += top + _MARGIN
    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {round(wide)} {round(high)}",
            "width": str(round(wide)),
            "height": str(round(high)),
            "font-family": FONT,
        },
    )
    SubElement(root, "title").text = clean(drawing.title)
    marker = shape(shape(root, "defs"), "marker", id="arrow", viewBox="0 0 8 8", refX="7", refY="4")
    marker.attrib.update(markerWidth="7", markerHeight="7", orient="auto")
    shape(marker, "path", d="M0 0.6L8 4L0 7.4z", fill="edge")
    shape(root, "rect", width="100%", height="100%", fill="paper")
    write(root, _MARGIN, 46, clean(drawing.title), 22, "ink", bold=True)
    write(root, _MARGIN, 70, clean(drawing.facts), 13, "faint")
    for entry, left, line in legend:
        entry.draw(root, _MARGIN + left, _TOP + LINE * line)
    for sheet, (x, y) in zip(sheets, places, strict=True):
        _draw_sheet(root, sheet, x, top + y)
    colored(root, theme)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _sheet(panel: Panel, heatmap: Heatmap, *, alone: bool) -> _Sheet:
    box = place(panel.block, heatmap, root=True, alone=alone)
    if not panel.letter:
        return _Sheet(panel, box, panel.title or ("" if alone else "Overview"), ())
    return _Sheet(panel, box, box.detail, _used(panel.used))


def _used(names: Sequence[str]) -> tuple[str, ...]:
    """The blocks that a panel stands for, as many names as fit, and the block whose sizes are shown."""
    shown = [shorten(clean(name), 40) for name in names]
    fit = 1
    while fit < len(shown) and len(", ".join(shown[: fit + 1])) <= _NAMES:
        fit += 1
    rest = f" and {len(names) - fit} more" if len(names) > fit else ""
    sizes = (f"sizes of {shown[0].partition(' × ')[0]}",) if len(names) > 1 else ()
    return (", ".join(shown[:fit]) + rest, *sizes)


def _packed(sheets: Sequence[_Sheet]) -> tuple[list[tuple[float, float]], float, float]:
    """Columns filled from the top, with the page shape closest to `_ASPECT` that is not too wide."""
    tallest = max(sheet.height for sheet in sheets)
    total = sum(sheet.height + _GAP for sheet in sheets)
    tried = [_columns(sheets, tallest + (total - tallest) * step / 20) for step in range(21)]
    return min(tried, key=lambda page: (max(page[1], _WIDEST), max(page[1] / _ASPECT, page[2]), page[1]))


def _columns(sheets: Sequence[_Sheet], limit: float) -> tuple[list[tuple[float, float]], float, float]:
    places: list[tuple[float, float]] = []
    x, y, column, lowest = _MARGIN, 0.0, 0.0, 0.0
    for sheet in sheets:
        if y and y + sheet.height > limit:
            x, y, column = x + column + _GAP, 0.0, 0.0
        places.append((x, y))
        y += sheet.height + _GAP
        column, lowest = max(column, sheet.width), max(lowest, y - _GAP)
    return places, x + column + _MARGIN, lowest


def _draw_sheet(root: Element, sheet: _Sheet, x: float, y: float) -> None:
    group = shape(root, "g", class_="panel")
    shape(group, "rect", x=x, y=y, width=sheet.width, height=sheet.height, rx=10.0, fill="card", stroke="rule")
    left = x + _INSET
    if sheet.panel.letter:
        shape(group, "circle", cx=left + 11, cy=y + 23, r=11.0, fill="ink")
        write(group, left + 11, y + 27.5, sheet.panel.letter, 12.5, "on-ink", bold=True, anchor="middle")
        left += 30
    write(group, left, y + 28, sheet.title, 14, "ink", bold=True)
    for line, note in enumerate(sheet.captions):
        write(group, x + _INSET, y + 48 + 15 * line, note, 11, "faint")
    middle = x + (sheet.width - sheet.box.size.width) / 2
    draw(group, sheet.box, middle, y + sheet.caption, counted=not sheet.panel.letter)


def _all(box: Box) -> Iterator[Box]:
    yield box
    for part in box.parts:
        yield from _all(part)
