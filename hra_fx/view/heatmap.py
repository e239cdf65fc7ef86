"""The heatmap of a picture: a value and a color for each adapted layer on a common scale, and their form in boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, nan
from typing import ClassVar

from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import DARK_PALETTE, HEATS, PALETTE, color, default_heat, heat_of, is_identity, scale
from hra_fx.view.drawing import Drawing
from hra_fx.view.theme import Theme
from hra_fx.view.tree import Item

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
        return ceil(len(self.colors) / self.columns) * CELL + 5 if self.colors else 0.0


NO_CELLS = Cells()


@dataclass(frozen=True)
class Heatmap:
    """One value for each adapted layer, in the unit and between the ends of the legend. Without values, none is shown.

    `name` is a key of `HEATS`.
    """

    name: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    ends: tuple[float, float] = (0.0, 1.0)
    palette: Sequence[str] = PALETTE
    #: Whether the page writes values and tips, so that `strip` only reserves the space for a value.
    is_live: ClassVar[bool] = False

    def mean(self, paths: Iterable[str]) -> float:
        """The mean of one or more layers; NaN if a value is unknown."""
        values = [self.values.get(path, nan) for path in paths]
        return sum(values) / len(values)

    def text(self, value: float) -> str:
        """Format a value with its unit."""
        return HEATS[self.name].text(value)

    def color(self, value: float) -> str:
        """The color of a value."""
        return color(value, self.ends, self.palette)

    def line(self, path: str) -> str:
        """Format a line of a tooltip: an adapted layer with its value."""
        return f"{path} · {self.text(self.mean([path]))}" if self.values else path

    def strip(self, item: Item) -> tuple[str, str]:
        """The text and the color of the mean value in a box; empty without a heatmap or an adapted layer."""
        if not self.values or not item.marks:
            return "", ""
        mean = self.mean(item.marks)
        words = ("" if HEATS[self.name].unit else "|Q-I| ") + self.text(mean)
        return (f"mean {words}" if len(item.marks) > 1 else words), self.color(mean)

    def cells(self, item: Item, width: float) -> Cells:
        """Create one cell for each adapted layer in a box. If the box represents several modules, each has a column."""
        if not self.values or not item.marks:
            return NO_CELLS
        fitting = max(int(width / _NARROWEST), 1)
        columns = item.count if 1 < item.count <= fitting else ceil(len(item.marks) / ceil(len(item.marks) / fitting))
        colors = tuple(self.color(self.mean([path])) for path in item.marks)
        return Cells(colors, tuple(map(self.line, item.marks)), columns)


def heatmap_of(drawing: Drawing, name: str | None, theme: Theme = "light") -> Heatmap:
    """Create the heatmap of a picture. `None` is `default_heat`, or no heatmap if no layer is rotated."""
    if name is None and (not drawing.rows or is_identity(drawing.rows)):
        return Heatmap()
    name = name or default_heat(drawing.rows)
    if not drawing.rows:
        raise VisualizeError(
            f"`heat` must be None for {drawing.title}, which has no adapters, got {name!r}. "
            "Draw a model that hra_fx.transform returned."
        )
    values = heat_of(drawing.rows, name)
    return Heatmap(name, values, scale(values.values()), DARK_PALETTE if theme == "dark" else PALETTE)
