"""The heat of a whole picture: a value and a color for each adapted layer, and the scale that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hra_fx.errors import VisualizeError
from hra_fx.reporting.colormap import color
from hra_fx.reporting.heat import HEATS, heat_of, scale
from hra_fx.view.drawing import Drawing


@dataclass(frozen=True)
class Heatmap:
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

    def color(self, value: float) -> str:
        """The color of a value."""
        return color(value, self.top)


def heatmap_of(drawing: Drawing, name: str | None) -> Heatmap | None:
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
    return Heatmap(name, values, scale(values.values()))


def _decimals(top: float) -> int:
    """So many that about a hundredth of the scale can be seen.

    >>> _decimals(45.0), _decimals(4.0), _decimals(0.04)
    (0, 2, 4)
    """
    return 0 if top >= 10 else max(2 - math.floor(math.log10(top)), 0)
