"""The heatmap of a picture: a value and a color for each adapted layer, on one scale."""

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
    """The values of a picture.

    Attributes:
        name: which measure, a key of `HEATS`.
        values: one for each adapted layer, in the unit of the legend.
        top: the upper end of the legend.
    """

    name: str
    values: Mapping[str, float]
    top: float

    def mean(self, paths: Iterable[str]) -> float:
        """The mean of some layers; NaN if there are none, or if one is unknown."""
        values = [self.values.get(path, math.nan) for path in paths]
        return sum(values) / len(values) if values else math.nan

    def text(self, value: float) -> str:
        """A value with its unit."""
        return "unknown" if math.isnan(value) else f"{value:.{_decimals(self.top)}f}{HEATS[self.name].unit}"

    def color(self, value: float) -> str:
        """The color of a value."""
        return color(value, self.top)


def heatmap_of(drawing: Drawing, name: str | None) -> Heatmap | None:
    """The heatmap of a picture, `None` for `None`.

    Raises:
        VisualizeError: the model has no adapters.
    """
    if name is None:
        return None
    if not drawing.rows:
        raise VisualizeError(
            f"`heat` must be None for {drawing.title}, which has no adapters, got {name!r}. "
            "Draw a model that went through hra_fx.transform."
        )
    values = heat_of(drawing.rows, name)
    return Heatmap(name, values, scale(values.values()))


def _decimals(top: float) -> int:
    """Enough decimals to show about a hundredth of the scale.

    >>> _decimals(45.0), _decimals(4.0), _decimals(0.04)
    (0, 2, 4)
    """
    return 0 if top >= 10 else max(2 - math.floor(math.log10(top)), 0)
