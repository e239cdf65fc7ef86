"""The legend of a picture: the colors and markers in it, in lines as wide as the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from hra_fx.reporting.colormap import UNKNOWN
from hra_fx.reporting.heat import HEATS
from hra_fx.view.heatmap import Heatmap
from hra_fx.view.svg import FRAMES, LOOKS, shape, skipped_marker, write
from hra_fx.view.text import width

LINE = 22.0  # height of a line
_GAP = 18.0
_STEPS, _STEP = 45, 4.0  # rectangles of the color bar, and their width


@dataclass(frozen=True)
class Entry:
    """One entry: its width, and a function that draws it at a position."""

    width: float
    draw: Callable[[Element, float, float], None]


#: Words of a look, and the dashes of its line.
_LOOKS = {
    "adapted_layer": ("adapted layer", ""),
    "trained": ("trained in full", ""),
    "plain": ("other operation", ""),
    "module": ("module", ""),
    "untraced": ("module that is not traced, without edges", "4 3"),
    "eager": ("not traced, without adapters", "4 3"),
}


def entries(looks: set[str], heatmap: Heatmap, skipped: int, refused: int) -> list[Entry]:
    """The entries of a picture's legend.

    Args:
        looks: the looks of all boxes.
        heatmap: the colors of adapted layers.
        skipped: number of layers without an adapter.
        refused: number of those that should have one.
    """
    found: list[Entry] = []
    if heatmap.values:
        found.append(_color_bar(heatmap))
        if any(math.isnan(value) for value in heatmap.values.values()):
            found.append(_swatch("unknown", UNKNOWN, "edge"))
    elif "adapted_layer" in looks:
        found.append(_swatch("adapter: r vectors of length d", "violet-pale", "violet-line"))
        looks = looks - {"adapted_layer"}  # one entry for the color of its box is enough
    if skipped > refused:
        found.append(_skipped(f"{_layers(skipped - refused)} not targeted", refused=False))
    if refused:
        found.append(_skipped(f"{_layers(refused)} targeted, but not adapted", refused=True))
    if looks & {"closed", "traced"}:
        looks = looks | {"module"}
    colors = {**LOOKS, **FRAMES, "module": FRAMES["traced"]}
    return found + [_swatch(words, *colors[look][:2], dash) for look, (words, dash) in _LOOKS.items() if look in looks]


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
        write(parent, x + 31, y + 12, words, 12, "faint")

    return Entry(31 + width(words, 12), draw)


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _skipped(words: str, *, refused: bool) -> Entry:
    def draw(parent: Element, x: float, y: float) -> None:
        skipped_marker(parent, x + 7, y + 7.5, refused=refused)
        write(parent, x + 18, y + 12, words, 12, "faint")

    return Entry(18 + width(words, 12), draw)


def _color_bar(heatmap: Heatmap) -> Entry:
    """The color scale, with the values at its ends."""
    unit, (bottom, top) = HEATS[heatmap.name].unit, heatmap.ends
    words, low, high = f"{HEATS[heatmap.name].words}:", f"{bottom:g}{unit}", f"{top:g}{unit}"
    bar = width(words, 12) + 6 + width(low, 12) + 6

    def draw(parent: Element, x: float, y: float) -> None:
        write(parent, x, y + 12, words, 12, "faint")
        write(parent, x + bar - 6, y + 12, low, 12, "ink", anchor="end")
        for step in range(_STEPS):
            fill = heatmap.color(bottom + (top - bottom) * step / (_STEPS - 1))
            shape(parent, "rect", x=x + bar + step * _STEP, y=y, width=_STEP, height=15.0, fill=fill, class_="heat")
        shape(parent, "rect", x=x + bar, y=y, width=_STEPS * _STEP, height=15.0, fill="none", stroke="edge")
        write(parent, x + bar + _STEPS * _STEP + 6, y + 12, high, 12, "ink")

    return Entry(bar + _STEPS * _STEP + 6 + width(high, 12), draw)
