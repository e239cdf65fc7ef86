"""The `.svg` file: title, facts, legend, and the boxes of the model. The page has the same legend and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from hra_fx.reporting.skipped_layers import SkippedLayer
from hra_fx.reporting.words import counted, shorten
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.layout import place
from hra_fx.view.opening import Block, Options, opened
from hra_fx.view.svg import FONT, FRAMES, LOOKS, draw, shape, skipped_marker, write
from hra_fx.view.theme import HEAT, UNKNOWN, colored, dark_rules, width

LINE = 22.0  # height of a line
_GAP = 18.0
_STEP = 12.0  # width of a step of the color bar
#: The description of a look, and the dashes of its line.
_LOOKS = {
    "adapted_layer": ("adapted layer", ""),
    "trained": ("trained in full", ""),
    "plain": ("other operation", ""),
    "module": ("module", ""),
    "untraced": ("module that is not traced, without edges", "4 3"),
    "eager": ("not traced, without adapters", "4 3"),
}
_MARGIN, _INSET = 32.0, 24.0
_TOP = 88.0  # y of the legend
_NARROWEST = 560.0
_LETTERS = 72  # of the title


@dataclass(frozen=True)
class Entry:
    """An entry of the legend: its width, and a function that draws it at a position."""

    width: float
    draw: Callable[[Element, float, float], None]


def entries(looks: set[str], heatmap: Heatmap, skipped: Sequence[SkippedLayer]) -> list[Entry]:
    """The entries of a picture's legend: the looks of its boxes, the heatmap, and the layers without an adapter."""
    found: list[Entry] = []
    if heatmap.values:
        found.append(_color_bar(heatmap))
        if any(math.isnan(value) for value in heatmap.values.values()):
            found.append(_swatch("unknown", UNKNOWN[0], "edge"))
    elif "adapted_layer" in looks:
        found.append(_swatch("adapter: r vectors of length d", "violet-pale", "violet-line"))
        looks = looks - {"adapted_layer"}  # one entry for the color of the box is sufficient
    for targeted, words in ((False, "not targeted"), (True, "targeted, but not adapted")):
        if count := sum(layer.targeted is targeted for layer in skipped):
            found.append(_skipped(f"{counted(count, 'layer')} {words}", refused=targeted))
    if looks & {"closed", "traced"}:
        looks = looks | {"module"}
    colors = {**LOOKS, **FRAMES, "module": FRAMES["traced"]}
    return found + [_swatch(words, *colors[look][:2], dash) for look, (words, dash) in _LOOKS.items() if look in looks]


def placed(legend: Sequence[Entry], wide: float) -> list[tuple[Entry, float, int]]:
    """Assign an x position and a line to each entry. A line is at most `wide`."""
    places: list[tuple[Entry, float, int]] = []
    x, line = 0.0, 0
    for entry in legend:
        if x and x + entry.width > wide:
            x, line = 0.0, line + 1
        places.append((entry, x, line))
        x += entry.width + _GAP
    return places


def _swatch(words: str, fill: str, line: str, dashes: str = "") -> Entry:
    def draw(parent: Element, x: float, y: float) -> None:
        swatch = shape(parent, "rect", x=x, y=y, width=24.0, height=15.0, rx=4.0, fill=fill, stroke=line)
        if dashes:
            swatch.set("stroke-dasharray", dashes)
        write(parent, x + 31, y + 12, words, 12, "faint")

    return Entry(31 + width(words, 12), draw)


def _skipped(words: str, *, refused: bool) -> Entry:
    def draw(parent: Element, x: float, y: float) -> None:
        skipped_marker(parent, x + 7, y + 7.5, refused=refused)
        write(parent, x + 18, y + 12, words, 12, "faint")

    return Entry(18 + width(words, 12), draw)


def _color_bar(heatmap: Heatmap) -> Entry:
    """Create the color scale with the values at its ends."""
    words, low, high = f"{heatmap.heat.words}:", f"0{heatmap.heat.unit}", f"{heatmap.top:g}{heatmap.heat.unit}"
    bar = width(words, 12) + 6 + width(low, 12) + 6
    long = _STEP * len(HEAT)

    def draw(parent: Element, x: float, y: float) -> None:
        write(parent, x, y + 12, words, 12, "faint")
        write(parent, x + bar - 6, y + 12, low, 12, "ink", anchor="end")
        for step, (fill, _) in enumerate(HEAT):
            shape(parent, "rect", x=x + bar + step * _STEP, y=y, width=_STEP, height=15.0, fill=fill, class_="heat")
        shape(parent, "rect", x=x + bar, y=y, width=long, height=15.0, fill="none", stroke="edge")
        write(parent, x + bar + long + 6, y + 12, high, 12, "ink")

    return Entry(bar + long + 6 + width(high, 12), draw)


def render_svg(drawing: Drawing, options: Options) -> str:
    """Render an SVG file of a model, or of a part of it."""
    block = opened(drawing.tree(), options.depth, options.focus or "")
    heatmap = heatmap_of(drawing.report.rows)
    box = place(block, heatmap, root=True)
    title = shorten(drawing.title, _LETTERS)
    words = max(width(title, 22, bold=True), width(drawing.facts, 13))
    card = max(box.size.width + 2 * _INSET, _NARROWEST - 2 * _MARGIN, words)
    legend = placed(entries(looks_of(block), heatmap, drawing.report.skipped), card)
    top = _TOP + LINE * (1 + max((line for *_, line in legend), default=-1)) + 14
    high = box.size.height + 2 * _INSET
    root = _canvas(round(card + 2 * _MARGIN), round(top + high + _MARGIN), title, drawing.facts)
    for entry, left, line in legend:
        entry.draw(root, _MARGIN + left, _TOP + LINE * line)
    shape(root, "rect", x=_MARGIN, y=top, width=card, height=high, rx=10.0, fill="card", stroke="rule")
    draw(root, box, _MARGIN + (card - box.size.width) / 2, top + _INSET, _count_adapted, root=True)
    colored(root)
    style = Element("style")
    style.text = dark_rules(tostring(root, encoding="unicode"))
    root.insert(1, style)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _count_adapted(group: Element, block: Block) -> None:
    if block.parts is None:
        group.set("data-adapted", str(len(block.item.marks)))


def _canvas(wide: int, high: int, title: str, facts: str) -> Element:
    """Create an SVG element with a background, the title and the facts."""
    size = {"viewBox": f"0 0 {wide} {high}", "width": str(wide), "height": str(high)}
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": FONT})
    SubElement(root, "title").text = title
    arrow(root)
    shape(root, "rect", width="100%", height="100%", fill="paper")
    write(root, _MARGIN, 46, title, 22, "ink", bold=True)
    write(root, _MARGIN, 70, facts, 13, "faint")
    return root


def arrow(root: Element) -> None:
    """Define the end of edges."""
    marker = shape(shape(root, "defs"), "marker", id="arrow", viewBox="0 0 8 8", refX="7", refY="4")
    marker.attrib.update(markerWidth="7", markerHeight="7", orient="auto")
    shape(marker, "path", d="M0 0.6L8 4L0 7.4z", fill="edge")


def looks_of(block: Block) -> set[str]:
    """The looks of all blocks inside a block."""
    return {look for part in block.parts or () for look in (part.look, *looks_of(part))}
