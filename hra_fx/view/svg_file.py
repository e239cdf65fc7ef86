"""The `.svg` file: title, facts, legend, and the boxes of the model. The page has the same legend and boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element, SubElement, tostring

from hra_fx.reporting.skipped_layers import SkippedLayer
from hra_fx.reporting.words import counted, shorten
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.layout import place
from hra_fx.view.opening import Opening
from hra_fx.view.svg import FONT, LOOKS, Look, draw, number, shape, skipped_marker, write
from hra_fx.view.theme import HEAT, UNKNOWN, colored, dark_rules, width
from hra_fx.view.tree import Scope

LINE = 22.0  # height of a line
_GAP = 18.0
_STEP = 12.0  # width of a step of the color bar
#: An entry of the legend: its width, and its element.
Entry: TypeAlias = tuple[float, Element]
_MARGIN, _INSET = 32.0, 24.0
_TOP = 88.0  # y of the legend
_NARROWEST = 560.0
_LETTERS = 72  # of the title


def entries(looks: set[str], heatmap: Heatmap, skipped: Sequence[SkippedLayer]) -> list[Entry]:
    """The entries of a picture's legend: the looks of its boxes, the heatmap, and the layers without an adapter."""
    found: list[Entry] = []
    if heatmap.values:
        found.append(_color_bar(heatmap))
        if any(math.isnan(value) for value in heatmap.values.values()):
            found.append(_swatch(Look(UNKNOWN[0], "edge", "", "unknown")))
    elif "adapted_layer" in looks:
        found.append(_swatch(Look("violet-pale", "violet-line", "", "adapter: r vectors of length d")))
        looks = looks - {"adapted_layer"}  # one entry for the color of the box is sufficient
    for targeted, words in ((False, "not targeted"), (True, "targeted, but not adapted")):
        if count := sum(layer.targeted is targeted for layer in skipped):
            group = Element("g")
            skipped_marker(group, 7, 7.5, refused=targeted)
            found.append((18 + _words(group, 18, f"{counted(count, 'layer')} {words}"), group))
    shown = dict.fromkeys(look for name, look in LOOKS.items() if name in looks and look.words)
    return found + [_swatch(look) for look in shown]


def _words(group: Element, x: float, words: str, ink: str = "faint") -> float:
    """Write words, and return their width."""
    write(group, x, 12, words, 12, ink)
    return width(words, 12)


def _swatch(look: Look) -> Entry:
    group = Element("g")
    swatch = shape(group, "rect", x=0.5, y=0, width=24.0, height=15.0, rx=4.0, fill=look.fill, stroke=look.line)
    if look.dashes:
        swatch.set("stroke-dasharray", look.dashes)
    return 31 + _words(group, 31, look.words), group


def _color_bar(heatmap: Heatmap) -> Entry:
    """Create the color scale with the values at its ends."""
    group, unit = Element("g"), heatmap.measure.unit
    left = _words(group, 0, f"{heatmap.measure.field.replace('_', ' ')}:") + 6
    left += _words(group, left, f"0{unit}", "ink") + 6
    for step, (fill, _) in enumerate(HEAT):
        shape(group, "rect", x=left + step * _STEP, y=0, width=_STEP, height=15.0, fill=fill, class_="heat")
    shape(group, "rect", x=left, y=0, width=len(HEAT) * _STEP, height=15.0, fill="none", stroke="edge")
    left += len(HEAT) * _STEP + 6
    return left + _words(group, left, f"{heatmap.top:g}{unit}", "ink"), group


def render_svg(drawing: Drawing, root: Scope, is_open: Opening) -> str:
    """Render an SVG file of a model, or of a part of it."""
    heatmap = heatmap_of(drawing.report.rows)
    box = place(root, is_open, heatmap, root=not root.path)
    title = shorten(drawing.title_of(root), _LETTERS)
    words = max(width(title, 22, bold=True), width(drawing.facts, 13))
    card = max(box.size.width + 2 * _INSET, _NARROWEST - 2 * _MARGIN, words)
    x, top = 0.0, _TOP
    legend = entries(box.looks(), heatmap, root.skipped)
    for wide, entry in legend:
        if x and x + wide > card:
            x, top = 0.0, top + LINE
        entry.set("transform", f"translate({number(_MARGIN + x)} {number(top)})")
        x += wide + _GAP
    top += LINE + 14
    high = box.size.height + 2 * _INSET
    size = (str(round(card + 2 * _MARGIN)), str(round(top + high + _MARGIN)))
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {' '.join(size)}"})
    svg.attrib.update({"width": size[0], "height": size[1], "font-family": FONT})
    SubElement(svg, "title").text = title
    arrow(svg)
    shape(svg, "rect", width="100%", height="100%", fill="paper")
    write(svg, _MARGIN, 46, title, 22, "ink", bold=True)
    write(svg, _MARGIN, 70, drawing.facts, 13, "faint")
    svg.extend(entry for _, entry in legend)
    shape(svg, "rect", x=_MARGIN, y=top, width=card, height=high, rx=10.0, fill="card", stroke="rule")
    draw(svg, box, _MARGIN + (card - box.size.width) / 2, top + _INSET, root=not root.path)
    colored(svg)
    style = Element("style")
    style.text = dark_rules(tostring(svg, encoding="unicode"))
    svg.insert(1, style)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(svg, encoding="unicode") + "\n"


def arrow(root: Element) -> None:
    """Define the end of edges. Its id is not the path of a module."""
    marker = shape(shape(root, "defs"), "marker", id="//arrow", viewBox="0 0 8 8", refX="7", refY="4")
    marker.attrib.update(markerWidth="7", markerHeight="7", orient="auto")
    shape(marker, "path", d="M0 0.6L8 4L0 7.4z", fill="edge")
