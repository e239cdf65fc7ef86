"""The measures that colors and axes can show: a field of a report's rows, with its unit and its scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting.row import Row

_ROUND = (1.0, 1.2, 1.5, 1.8, 2.0, 2.5, 3.0, 4.0, 4.5, 5.0, 6.0, 8.0, 9.0, 10.0)
#: Below this, powers of ten underflow to zero.
_LEAST = 1e-300


@dataclass(frozen=True)
class Heat:
    """One measure of how far a layer is rotated.

    Attributes:
        field: the field of a row.
        words: its name in a legend.
        unit: the unit of its values.
        factor: factor from the field to that unit.
    """

    field: str
    words: str
    unit: str
    factor: float

    def value(self, row: Row) -> float:
        """The value of a row in that unit."""
        return float(getattr(row, self.field)) * self.factor


_DEGREES = 180 / math.pi
HEATS: Mapping[str, Heat] = {
    heat.field: heat
    for heat in (
        Heat("mean_angle", "mean angle", "°", _DEGREES),
        Heat("angle", "largest angle", "°", _DEGREES),
        Heat("rotation", "|Q - I|", "", 1.0),
        Heat("share", "share of the weight", "%", 100.0),
    )
}


def largest(values: Iterable[float]) -> float:
    """The largest of at least one value, or NaN if one is NaN (which `max` may miss).

    >>> largest([1.0, 3.0]), largest([1.0, math.nan])
    (3.0, nan)
    """
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def heat_named(name: object) -> Heat:
    """The measure of a name.

    Raises:
        VisualizeError: the name is unknown.

    Example:
        >>> heat_named("angle").words
        'largest angle'
    """
    if not isinstance(name, str) or name not in HEATS:
        raise VisualizeError(f"`heat` must be one of {', '.join(map(repr, HEATS))}, got {name!r}.")
    return HEATS[name]


def heat_of(rows: Iterable[Row], name: str) -> dict[str, float]:
    """The value of every adapted layer in the unit of the legend: degrees, percent, or none.

    Args:
        rows: the rows of a report. A layer with several rows gets the largest value of its active adapters, or of all
            its adapters if none is active.
        name: one of `HEATS`.
    """
    by_layer: dict[str, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(row.path, []).append(row)
    used = {path: [row for row in own if row.active] or own for path, own in by_layer.items()}
    return {path: largest(map(HEATS[name].value, own)) for path, own in used.items()}


def scale(values: Iterable[float]) -> float:
    """The upper end of a legend: a round number that is at least the largest value.

    >>> scale([3.1, 17.4]), scale([0.0]), scale([0.031, float("nan")]), scale([180.0])
    (18.0, 1.0, 0.04, 180.0)
    """
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest < _LEAST:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    # Rounding noise must not lift 180 degrees, a reflection, to the next step.
    step = next((step for step in _ROUND if step * power >= largest * (1 - 1e-6)), 10.0)
    return float(f"{step * power:.3g}")
