"""The measures that colors and axes can show: a field of a report's rows, with its unit, its scale and its colors.

The colors are parts of matplotlib's magma. On light pages they go from pale (small values) to dark (large values), and
on dark pages from purple to pale, so that large values stand out. The order is visible with every kind of color
blindness and in black and white prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting.row import Row, largest

#: Colors at equal steps of the scale. Between them, the channels are interpolated linearly.
PALETTE = ("#fcf7b9", "#fec88c", "#fd9869", "#f4675c", "#d8456c", "#ae347b", "#842681", "#5c167f", "#331067", "#0e0b2b")
#: The colors for dark pages. Each has a contrast of at least 3:1 with the boxes.
DARK_PALETTE = (
    *("#ca3e72", "#dc4869", "#ec5860", "#f66c5c", "#fb8560"),
    *("#fd9b6b", "#feb47b", "#feca8d", "#fde2a3", "#fcf7b9"),
)
#: The color of a value that could not be computed.
UNKNOWN = "#c9ced6"
#: The ends of a scale are multiples of one of these numbers times a power of ten, and about this many steps apart.
_ROUND, _STEPS = (1.0, 2.0, 5.0, 10.0), 10
_DEGREES = 180 / math.pi


def color(value: float, ends: tuple[float, float], palette: Sequence[str] = PALETTE) -> str:
    """The color of a value on a scale with these ends.

    >>> color(5.0, (5.0, 10.0)), color(10.0, (5.0, 10.0)), color(float("nan"), (5.0, 10.0))
    ('#fcf7b9', '#0e0b2b', '#c9ced6')
    """
    if math.isnan(value):
        return UNKNOWN
    share = (value - ends[0]) / (ends[1] - ends[0])
    place = min(max(share, 0.0), 1.0) * (len(palette) - 1)
    index = min(int(place), len(palette) - 2)
    low, high = (_channels(palette[index + end]) for end in (0, 1))
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink_on(fill: str) -> str:
    """Black or white: the color with the higher contrast on another color (at least 4.5:1).

    >>> ink_on("#fcf7b9"), ink_on("#0e0b2b")
    ('#000000', '#ffffff')
    """
    # The relative luminance of https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
    shares = [channel / 255 for channel in _channels(fill)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _channels(fill: str) -> Sequence[int]:
    return [int(fill[start : start + 2], 16) for start in (1, 3, 5)]


@dataclass(frozen=True)
class Heat:
    """A measure of how far a layer is rotated: a field of a row, times a factor, in a unit. `words` is its name."""

    field: str
    words: str
    unit: str
    factor: float

    def value(self, row: Row) -> float:
        """The value of a row in the unit."""
        return float(getattr(row, self.field)) * self.factor

    def text(self, value: float) -> str:
        """Format a value in the unit, in the same way for tables, pictures and the page.

        >>> HEATS["weight_change"].text(11.52), HEATS["rotation"].text(0.5), HEATS["angle"].text(math.nan)
        ('11.5%', '0.500', 'unknown')
        """
        if math.isnan(value):
            return "unknown"
        return with_unit(value, self.unit) if self.unit else f"{value:.3f}"


HEATS: Mapping[str, Heat] = {
    heat.field: heat
    for heat in (
        Heat("weight_change", "weight change", "%", 100.0),
        Heat("mean_angle", "mean angle", "°", _DEGREES),
        Heat("angle", "largest angle", "°", _DEGREES),
        Heat("rotation", "|Q - I|", "", 1.0),
        Heat("share", "share of the weight", "%", 100.0),
    )
}


def with_unit(value: float, unit: str) -> str:
    """Format a value with its unit, with one decimal and at least two digits.

    >>> with_unit(45, "°"), with_unit(0.00057, "%"), with_unit(0, "%")
    ('45.0°', '0.00057%', '0%')
    """
    if 0 < value < 1e-6:
        return f"{value:.0e}{unit}".replace("e-0", "e-")  # as in JavaScript
    if 0 < value < 0.1:
        # No exponent, because it is hard to read in a column.
        return f"{value:.{1 - math.floor(math.log10(value))}f}".rstrip("0") + unit
    return f"{value:.1f}{unit}" if value else f"0{unit}"


def default_heat(rows: Iterable[Row]) -> str:
    """The default measure: the change of the weight, or the mean angle if no weight can be read."""
    return "weight_change" if any(math.isfinite(row.weight_change) for row in rows) else "mean_angle"


def is_identity(rows: Iterable[Row]) -> bool:
    """Whether all adapters of a report are the identity, as before training."""
    found = list(rows)
    return bool(found) and all(row.angles == () for row in found)


def heat_named(name: object) -> Heat:
    """The measure with this name; an error if there is none."""
    if not isinstance(name, str) or name not in HEATS:
        raise VisualizeError(f"`heat` must be one of {', '.join(map(repr, HEATS))}, got {name!r}.")
    return HEATS[name]


def heat_of(rows: Iterable[Row], name: str) -> dict[str, float]:
    """Layer -> the largest value of its active adapters, in the unit of the measure; 0 if none is active."""
    active: dict[str, list[Row]] = {}
    for row in rows:
        active.setdefault(row.path, []).extend([row] if row.active else [])
    return {path: largest(map(HEATS[name].value, own)) if own else 0.0 for path, own in active.items()}


def scale(values: Iterable[float]) -> tuple[float, float]:
    """The ends of a legend: round numbers around the values. If all values are equal, the scale starts at 0.

    >>> scale([79.2, 111.7]), scale([3.1, 17.4]), scale([0.031, float("nan")]), scale([0.0])
    ((75.0, 115.0), (2.0, 18.0), (0.0, 0.035), (0.0, 1.0))
    """
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high < 1e-290:  # powers of ten underflow to zero below it
        return 0.0, 1.0
    if high - low <= 1e-3 * high:
        low = 0.0
    least = (high - low) / _STEPS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in _ROUND if step * power >= least * (1 - 1e-6)) * power
    # Rounding noise must not raise 180 degrees (a reflection) to the next step.
    steps = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    bottom, top = (float(f"{count * step:.6g}") for count in steps)
    return bottom, top
