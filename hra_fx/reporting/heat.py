"""The measures of a report: a field of its rows, with its unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hra_fx.reporting.row import Row

_DEGREES = 180 / math.pi


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
        return f"{value:.0e}{unit}".replace("e-0", "e-")
    if 0 < value < 0.1:
        # No exponent, because it is hard to read in a column.
        return f"{value:.{1 - math.floor(math.log10(value))}f}".rstrip("0") + unit
    return f"{value:.1f}{unit}" if value else f"0{unit}"


def is_identity(rows: Iterable[Row]) -> bool:
    """Whether all adapters of a report are the identity, as before training."""
    found = list(rows)
    return bool(found) and all(row.angles == () for row in found)
