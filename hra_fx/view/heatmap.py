"""The heatmap of a picture: how much each adapted layer is changed, as a color on a common scale from 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hra_fx.reporting.columns import MEASURES, Measure, is_identity
from hra_fx.reporting.row import Row, largest
from hra_fx.view.theme import HEAT, UNKNOWN
from hra_fx.view.tree import Item, Leaf

CELL = 8.0  # height of a row of heat cells
_NARROWEST = 3.0  # width of a cell


@dataclass(frozen=True)
class Cells:
    """A grid of colored cells with tooltips, one for each adapted layer in a box, row by row."""

    colors: tuple[str, ...] = ()
    tips: tuple[str, ...] = ()
    columns: int = 1

    @property
    def height(self) -> float:
        """The height of the rows and of the space above them."""
        return math.ceil(len(self.colors) / self.columns) * CELL + 5 if self.colors else 0.0


@dataclass(frozen=True)
class Heatmap:
    """One value for each adapted layer, from 0 to the end of the legend. Without values, none is shown."""

    measure: Measure = MEASURES["weight_change"]
    values: Mapping[str, float] = field(default_factory=dict)
    top: float = 1.0

    def mean(self, paths: Iterable[str]) -> float:
        """The mean of one or more layers; NaN if a value is unknown."""
        values = [self.values.get(path, math.nan) for path in paths]
        return sum(values) / len(values)

    def color(self, value: float) -> str:
        """The color of a value on a light background."""
        return UNKNOWN[0] if math.isnan(value) else HEAT[min(int(value / self.top * len(HEAT)), len(HEAT) - 1)][0]

    def line(self, path: str) -> str:
        """Format a line of a tooltip: an adapted layer with its value."""
        return f"{path} · {self.measure.text(self.mean([path]))}" if self.values else path

    def strip(self, item: Item) -> tuple[str, str]:
        """The text and the color of the mean value in a box; empty without a heatmap or an adapted layer."""
        if not self.values or not item.marks:
            return "", ""
        mean = self.mean(item.marks)
        return "mean " * (len(item.marks) > 1) + self.measure.text(mean), self.color(mean)

    def cells(self, item: Item, width: float) -> Cells:
        """Create one cell for each adapted layer in a box. If the box represents several modules, each has a column.

        A leaf with one layer has only a strip.
        """
        if not self.values or not item.marks or (isinstance(item, Leaf) and len(item.marks) == 1):
            return Cells()
        fitting = max(int(width / _NARROWEST), 1)
        rows = math.ceil(len(item.marks) / fitting)
        columns = item.count if 1 < item.count <= fitting else math.ceil(len(item.marks) / rows)
        colors = tuple(self.color(self.mean([path])) for path in item.marks)
        return Cells(colors, tuple(map(self.line, item.marks)), columns)


def heatmap_of(rows: Iterable[Row]) -> Heatmap:
    """The heatmap of a report: the largest change of a layer's weight by an active adapter, 0 if none is active.

    If no weight can be read, it is the mean angle. It has no values without rows, or if all adapters are the identity.
    """
    rows = list(rows)
    if not rows or is_identity(rows):
        return Heatmap()
    measure = MEASURES["weight_change" if any(row.weight_change is not None for row in rows) else "mean_angle"]
    active: dict[str, list[float]] = {}
    for row in rows:
        active.setdefault(row.path, []).extend([measure.value(row)] if row.active else [])
    values = {path: largest(own) if own else 0.0 for path, own in active.items()}
    return Heatmap(measure, values, round_up(max(filter(math.isfinite, values.values()), default=0.0)))


def round_up(value: float) -> float:
    """The end of a scale from 0: a round number that is at least a value.

    >>> round_up(17.4), round_up(0.031), round_up(180), round_up(0)
    (18.0, 0.031, 180.0, 1.0)
    """
    if value < 1e-290:  # powers of ten underflow to zero below it
        return 1.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step * (1 - 1e-6)) * step:.6g}")
