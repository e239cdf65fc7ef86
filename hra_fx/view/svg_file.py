"""A picture with its title, facts and legend, and the `.svg` file of one picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.etree.ElementTree import Element, SubElement, tostring

from hra_fx.reporting.columns import MEASURES
from hra_fx.reporting.words import counted, shorten
from hra_fx.view.drawing import Drawing
from hra_fx.view.opening import Opening
from hra_fx.view.svg import Pen, Span, line_width, shape, skipped_marker, write
from hra_fx.view.theme import HEAT, dark_rules
from hra_fx.view.tree import Scope

FONT = "'Segoe UI', Roboto, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_MARGIN, _TOP, _LEGEND = 32.0, 124.0, 88.0  # of the boxes, and y of the boxes and the legend
_STEP = 12.0  # width of a step of the color bar
_LETTERS = 72  # of the title


def title_of(drawing: Drawing, root: Scope) -> str:
    """The title of the picture of the model, or of a module in it."""
    return f"{root.path} in {drawing.title}" if root.path else drawing.title


def picture_of(
    drawing: Drawing, root: Scope, is_open: Opening, link: Callable[[Scope], str] = lambda scope: ""
) -> Element:
    """Draw a model, or a module in it; see `Pen` for the links."""
    box = Pen(drawing, is_open, link).draw(root, root=not root.path)
    title, facts = Span(shorten(title_of(drawing, root), _LETTERS), 22, bold=True), Span(drawing.facts, 13, "faint")
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": FONT})
    SubElement(svg, "title").text = title.text
    shape(svg, "rect", width="100%", height="100%", fill="card")
    write(svg, _MARGIN, 46, title)
    write(svg, _MARGIN, 70, facts)
    inner = max(box.size.width, line_width([title]), line_width([facts]), _draw_legend(svg, drawing, root) - _MARGIN)
    box.put(svg, _MARGIN + (inner - box.size.width) / 2, _TOP)
    wide, high = str(round(inner + 2 * _MARGIN)), str(round(_TOP + box.size.height + _MARGIN))
    svg.attrib.update({"viewBox": f"0 0 {wide} {high}", "width": wide, "height": high})
    return svg


def _draw_legend(svg: Element, drawing: Drawing, root: Scope) -> float:
    """Explain the colors and the marks of layers in a picture, and return the right end."""
    group, x = shape(svg, "g", transform=f"translate(0 {_LEGEND:g})"), _MARGIN

    def words(text: str, ink: str = "faint") -> float:
        write(group, x, 12, Span(text, 12, ink))
        return x + line_width([Span(text, 12)]) + 6

    if drawing.largest_change:
        x = words("weight change: 0%")
        for step in range(len(HEAT)):
            place = {"x": x + step * _STEP, "width": _STEP, "height": 15.0}
            shape(group, "rect", **place, fill=f"heat{step}", class_="heat")
        x += len(HEAT) * _STEP + 6
        x = words(MEASURES["weight_change"].text(100 * drawing.largest_change)) + 12
    is_unknown = drawing.largest_change and any(math.isnan(drawing.changes[path]) for path in root.marks)
    swatches = {"unknown": ("unknown", is_unknown), "blue-pale": ("trained in full", root.trained)}
    for fill, (why, is_shown) in swatches.items():
        if is_shown:
            shape(group, "rect", x=x, width=24.0, height=15.0, fill=fill, stroke="line")
            x += 31
            x = words(why) + 12
    for targeted, why in ((False, "not targeted"), (True, "targeted, but not adapted")):
        if count := sum(layer.targeted is targeted for layer in root.skipped):
            skipped_marker(group, x + 7, 7.5, targeted=targeted)
            x += 18
            x = words(f"{counted(count, 'layer')} {why}") + 12
    return x


def render_svg(drawing: Drawing, root: Scope, is_open: Opening) -> str:
    """Render an SVG file of a model, or of a part of it."""
    svg = picture_of(drawing, root, is_open)
    style = Element("style")
    style.text = dark_rules(tostring(svg, encoding="unicode"))
    svg.insert(1, style)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(svg, encoding="unicode") + "\n"
