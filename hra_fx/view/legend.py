"""The legend of a picture: the colors and markers in it, in lines as wide as the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from hra_fx.reporting.colormap import UNKNOWN
from hra_fx.reporting.heat import HEATS
from hra_fx.view.boxes import Box
from hra_fx.view.heatmap import Heatmap
from hra_fx.view.svg import EDGE, FAINT, FRAMES, INK, LOOKS, VIOLET_LINE, VIOLET_PALE, shape, skipped_marker, write
from hra_fx.view.text import width

LINE = 22.0  # height of a line
_GAP = 18.0
_STEPS, _STEP = 45, 4.0  # rectangles of the color bar, and their width


@dataclass(frozen=True)
class Entry:
    """One entry: its width, and a function that draws it at a position."""

    width: float
    draw: Callable[[Element, float, float], None]


def entries(boxes: Collection[Box], heatmap: Heatmap, skipped: int) -> list[Entry]:
    """The entries of a picture's legend.

    Args:
        boxes: all boxes of the picture.
        heatmap: the colors of adapted layers.
        skipped: number of layers without an adapter.
    """
    looks = {box.look for box in boxes}
    found: list[Entry] = []
    if heatmap.values:
        found.append(_color_bar(heatmap))
        if any(math.isnan(value) for value in heatmap.values.values()):
            found.append(_swatch("unknown", UNKNOWN, EDGE))
    elif "adapted_layer" in looks:
        found.append(_swatch("adapter: r vectors of length d, |Q-I| = size of the rotation", VIOLET_PALE, VIOLET_LINE))
    if skipped:
        found.append(_skipped(skipped))
    closed = "closed module, see the panel with its letter" if any(box.letter for box in boxes) else "closed module"
    for look, words in (
        ("adapted_layer", "adapted layer"),
        ("trained", "trained in full"),
        ("plain", "other operation"),
        ("closed", closed),
    ):
        if look in looks:
            found.append(_swatch(words, *LOOKS[look][:2]))
    if "traced" in looks:
        found.append(_swatch("traced module", *FRAMES["traced"]))
    if "untraced" in looks:
        found.append(_swatch("module that is not traced: in order of definition, without edges", *FRAMES["untraced"]))
    if "eager" in looks:
        found.append(_swatch("not traced, without adapters", *LOOKS["eager"][:2], "4 3"))
    return found


def placed(legend: Collection[Entry], wide: float) -> list[tuple[Entry, float, int]]:
    """Each entry with its x position and its line.

    Args:
        legend: the entries.
        wide: maximum width of a line.
    """
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
        write(parent, x + 31, y + 12, words, 12, FAINT)

    return Entry(31 + width(words, 12), draw)


def _skipped(count: int) -> Entry:
    words = f"{count} layer{'s' * (count != 1)} not adapted (the tooltip has the reason)"

    def draw(parent: Element, x: float, y: float) -> None:
        skipped_marker(parent, x + 7, y + 7.5)
        write(parent, x + 18, y + 12, words, 12, FAINT)

    return Entry(18 + width(words, 12), draw)


def _color_bar(heatmap: Heatmap) -> Entry:
    """The color scale, with the values at its ends."""
    unit = HEATS[heatmap.name].unit
    words, low, high = f"adapter, {HEATS[heatmap.name].words}:", f"0{unit}", f"{heatmap.top:g}{unit}"
    bar = width(words, 12) + 6 + width(low, 12) + 6

    def draw(parent: Element, x: float, y: float) -> None:
        write(parent, x, y + 12, words, 12, FAINT)
        write(parent, x + bar - 6, y + 12, low, 12, INK, anchor="end")
        for step in range(_STEPS):
            fill = heatmap.color(heatmap.top * step / (_STEPS - 1))
            shape(parent, "rect", x=x + bar + step * _STEP, y=y, width=_STEP, height=15.0, fill=fill, class_="heat")
        shape(parent, "rect", x=x + bar, y=y, width=_STEPS * _STEP, height=15.0, fill="none", stroke=EDGE)
        write(parent, x + bar + _STEPS * _STEP + 6, y + 12, high, 12, INK)

    return Entry(bar + _STEPS * _STEP + 6 + width(high, 12), draw)
