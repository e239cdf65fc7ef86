"""How far training turned each layer, as a colour.

The colours go from pale to dark (a part of matplotlib's magma, reversed), so that their order survives every kind of
colour blindness and a black and white print. A layer that nothing turned is palest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting import Row
from hra_fx.view.drawing import Drawing

#: Colours at equal steps from 0 to the top of the legend; between them the three channels are interpolated linearly.
PALETTE = ("#fcf7b9", "#fec88c", "#fd9869", "#f4675c", "#d8456c", "#ae347b", "#842681", "#5c167f", "#331067", "#0e0b2b")
#: The colour of a value that could not be computed.
UNKNOWN = "#c9ced6"
_ROUND = (1.0, 1.2, 1.5, 1.8, 2.0, 2.5, 3.0, 4.0, 4.5, 5.0, 6.0, 8.0, 9.0, 10.0)


@dataclass(frozen=True)
class Heat:
    """One way to say how far a layer was turned: its words and unit in a legend, and the factor from the report."""

    words: str
    unit: str
    factor: float


HEATS: Mapping[str, Heat] = {
    "mean_angle": Heat("mean angle", "°", 180 / math.pi),
    "angle": Heat("largest angle", "°", 180 / math.pi),
    "rotation": Heat("|Q - I|", "", 1.0),
    "share": Heat("share of the weight that is turned", "%", 100.0),
}


@dataclass(frozen=True)
class Heating:
    """The values of a whole picture.

    Attributes:
        name: which heat.
        values: one for each adapted layer, in the unit of the legend.
        top: the upper end of the legend.
    """

    name: str
    values: Mapping[str, float]
    top: float

    def mean(self, paths: Iterable[str]) -> float:
        """The mean of some layers; NaN where there is none, or one of them is unknown."""
        values = [self.values.get(path, math.nan) for path in paths]
        return sum(values) / len(values) if values else math.nan

    def text(self, value: float) -> str:
        """A value with its unit."""
        return "unknown" if math.isnan(value) else f"{value:.{_decimals(self.top)}f}{HEATS[self.name].unit}"

    def colour(self, value: float) -> str:
        """The colour of a value."""
        return colour(value, self.top)


def heating(drawing: Drawing, name: str | None) -> Heating | None:
    """The heat of a picture, `None` where none is asked for.

    Raises:
        VisualizeError: the model has no reflections.
    """
    if name is None:
        return None
    if not drawing.rows:
        raise VisualizeError(
            f"heat: {name!r} shows what reflections do, and {drawing.title} has none. "
            "Leave heat out, or draw a model that went through hra_fx.transform."
        )
    values = heat_of(drawing.rows, name)
    return Heating(name, values, scale(values.values()))


def heat_of(rows: Iterable[Row], name: str) -> dict[str, float]:
    """The value of every adapted layer, in the unit of the legend: degrees, percent, or none.

    Args:
        rows: those of a report. Of several rows of one layer the largest value counts.
        name: one of `HEATS`.
    """
    values: dict[str, float] = {}
    for row in rows:
        value = float(getattr(row, name)) * HEATS[name].factor
        before = values.get(row.path, value)
        values[row.path] = value if math.isnan(value) else before if math.isnan(before) else max(value, before)
    return values


def scale(values: Iterable[float]) -> float:
    """The upper end of a legend: a round number, no smaller than any of the values.

    >>> scale([3.1, 17.4]), scale([0.0]), scale([0.031, float("nan")]), scale([180.0])
    (18.0, 1.0, 0.04, 180.0)
    """
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    # Rounding noise must not lift 180 degrees, which are exactly a half turn, to the next step.
    step = next((step for step in _ROUND if step * power >= largest * (1 - 1e-6)), 10.0)
    return float(f"{step * power:.3g}")


def colour(value: float, top: float) -> str:
    """The colour of a value on a scale from 0 to `top`.

    >>> colour(0.0, 10.0), colour(10.0, 10.0), colour(float("nan"), 10.0)
    ('#fcf7b9', '#0e0b2b', '#c9ced6')
    """
    if math.isnan(value):
        return UNKNOWN
    place = min(max(value / top, 0.0), 1.0) * (len(PALETTE) - 1)
    index = min(int(place), len(PALETTE) - 2)
    low, high = (_channels(PALETTE[index + end]) for end in (0, 1))
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink_on(fill: str) -> str:
    """Black or white, whichever is easier to read on a colour: the contrast is 4.5:1 or better on every one.

    >>> ink_on("#fcf7b9"), ink_on("#0e0b2b")
    ('#000000', '#ffffff')
    """
    return "#000000" if (_luminance(fill) + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _channels(colour: str) -> Sequence[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _luminance(colour: str) -> float:
    """Relative luminance (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    shares = [channel / 255 for channel in _channels(colour)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _decimals(top: float) -> int:
    """So many that about a hundredth of the scale can be seen.

    >>> _decimals(45.0), _decimals(4.0), _decimals(0.04)
    (0, 2, 4)
    """
    return 0 if top >= 10 else max(2 - math.floor(math.log10(top)), 0)
