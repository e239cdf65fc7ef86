"""What a plot shows of a row: a field, its unit, and a round number at the end of its scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting.row import Row


@dataclass(frozen=True)
class Measure:
    """One field of rows as it is plotted.

    Attributes:
        title: what it is called.
        unit: what follows its numbers.
        value: its number of a row, in that unit.
    """

    title: str
    unit: str
    value: Callable[[Row], float]


_MEASURES = {
    "mean_angle": Measure("mean angle", "°", lambda row: math.degrees(row.mean_angle)),
    "angle": Measure("largest angle", "°", lambda row: math.degrees(row.angle)),
    "rotation": Measure("|Q - I|", "", lambda row: row.rotation),
    "share": Measure("share of the weight turned", "%", lambda row: 100 * row.share),
}


def measure_of(heat: str) -> Measure:
    """The measure of a field.

    Raises:
        VisualizeError: there is none of this name.

    Example:
        >>> measure_of("angle").title
        'largest angle'
    """
    if heat not in _MEASURES:
        raise VisualizeError(f"heat: {heat!r} is none. Choose one of {', '.join(map(repr, _MEASURES))}.")
    return _MEASURES[heat]


def round_top(values: Iterable[float]) -> float:
    """The smallest round number that no value is above, of one digit and 5 or 0; 1 where all are 0 or NaN.

    >>> round_top([0.0, 3.2]), round_top([0.013]), round_top([0.0, math.nan])
    (4.0, 0.015, 1.0)
    """
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest <= 0:
        return 1.0
    power = math.floor(math.log10(largest))
    steps = (float(f"{digit}e{power}") for digit in (1, 1.5, 2, 3, 4, 5, 6, 8, 10))
    return next((step for step in steps if step >= largest * (1 - 1e-9)), 10.0 ** (power + 1))


def number(value: float) -> str:
    """A number of a plot in at most three letters or so.

    >>> [number(value) for value in (0.0, 0.004, 0.25, 7.31, 123.4)]
    ['0', '.004', '.25', '7.3', '123']
    """
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    if value < 0.0005:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.2g}".removeprefix("0")
