"""The SVG picture: title, legend, and the boxes of the model."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

from hra_fx.view.boxes import place
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.legend import LINE, entries, placed
from hra_fx.view.opening import Block, opened
from hra_fx.view.options import Options
from hra_fx.view.svg import FONT, draw, shape, write
from hra_fx.view.text import clean, shorten, width
from hra_fx.view.theme import Theme, colored

_MARGIN, _INSET = 32.0, 24.0
_TOP = 88.0  # y of the legend
_NARROWEST = 560.0
_LETTERS = 72  # of the title


def render(drawing: Drawing, options: Options) -> str:
    """An SVG file that shows a model, or a part of it.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    theme = options.theme or "light"
    block = opened(drawing.tree(), options.depth, options.focus or "")
    return page(block, drawing, heatmap_of(drawing, options.heat, theme), theme)


def page(block: Block, drawing: Drawing, heatmap: Heatmap, theme: Theme = "light") -> str:
    """An SVG file, with the same bytes for the same blocks.

    Args:
        block: what is drawn.
        drawing: what the block is of, for the words above it.
        heatmap: the colors of adapted layers.
        theme: the colors of everything else.
    """
    box = place(block, heatmap, root=True)
    title = shorten(clean(drawing.title), _LETTERS)
    words = max(width(title, 22, bold=True), width(drawing.facts, 13))
    card = max(box.size.width + 2 * _INSET, _NARROWEST - 2 * _MARGIN, words)
    legend = placed(entries(_looks(block), heatmap, len(drawing.skipped), len(drawing.refused)), card)
    top = _TOP + LINE * (1 + max((line for *_, line in legend), default=-1)) + 14
    high = box.size.height + 2 * _INSET
    root = _canvas(round(card + 2 * _MARGIN), round(top + high + _MARGIN), title, drawing.facts)
    for entry, left, line in legend:
        entry.draw(root, _MARGIN + left, _TOP + LINE * line)
    shape(root, "rect", x=_MARGIN, y=top, width=card, height=high, rx=10.0, fill="card", stroke="rule")
    draw(root, box, _MARGIN + (card - box.size.width) / 2, top + _INSET, root=True)
    colored(root, theme)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _canvas(wide: int, high: int, title: str, facts: str) -> Element:
    """An SVG element with a background, the title and the facts."""
    size = {"viewBox": f"0 0 {wide} {high}", "width": str(wide), "height": str(high)}
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": FONT})
    SubElement(root, "title").text = title
    marker = shape(shape(root, "defs"), "marker", id="arrow", viewBox="0 0 8 8", refX="7", refY="4")
    marker.attrib.update(markerWidth="7", markerHeight="7", orient="auto")
    shape(marker, "path", d="M0 0.6L8 4L0 7.4z", fill="edge")
    shape(root, "rect", width="100%", height="100%", fill="paper")
    write(root, _MARGIN, 46, title, 22, "ink", bold=True)
    write(root, _MARGIN, 70, clean(facts), 13, "faint")
    return root


def _looks(block: Block) -> set[str]:
    """The looks of all blocks inside a block."""
    return {look for part in block.parts or () for look in (part.look, *_looks(part))}
