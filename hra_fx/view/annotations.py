"""What a picture shows on its boxes: how far layers are rotated, which are skipped, and which are trained in full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from hra_fx.reporting.heat import HEATS
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap
from hra_fx.view.text import clean
from hra_fx.view.tree import Item, Leaf

CELL = 8.0  # height of a row of heat cells
_NARROWEST = 3.0  # width of a cell


@dataclass(frozen=True)
class Cells:
    """A grid of colored cells, one for each adapted layer in a box, row by row.

    Attributes:
        colors: their fills.
        tips: their tooltips.
        columns: cells per row.
    """

    colors: tuple[str, ...] = ()
    tips: tuple[str, ...] = ()
    columns: int = 1

    @property
    def height(self) -> float:
        """Height of the rows and of the space above them."""
        return ceil(len(self.colors) / self.columns) * CELL + 5 if self.colors else 0.0


NO_CELLS = Cells()


@dataclass(frozen=True)
class Annotations:
    """The annotations of a picture.

    Attributes:
        heatmap: the heatmap, if one is shown.
        skipped: path of a layer without an adapter -> the reason.
        trained_in_full: paths of the layers in `modules_to_save`.
        wide: whether modules without edges may take the width of a whole page.
    """

    heatmap: Heatmap | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    trained_in_full: tuple[str, ...] = ()
    wide: bool = False

    @cached_property
    def _skipped_below(self) -> dict[str, list[str]]:
        return _by_module(self.skipped)

    @cached_property
    def _trained_below(self) -> dict[str, list[str]]:
        return _by_module(self.trained_in_full)

    def skipped_in(self, item: Item) -> list[str]:
        """The skipped layers that a box stands for, each once."""
        return list(dict.fromkeys(_in(item, self._skipped_below, self.skipped)))

    def trained_in(self, item: Item) -> list[str]:
        """The layers that a box stands for and that are trained in full, each once."""
        return list(dict.fromkeys(_in(item, self._trained_below, self.trained_in_full)))

    def lines(self, item: Item) -> list[str]:
        """Lines of a tooltip: why layers have no adapter, and which are trained in full."""
        skipped = [f"{path} has no adapter: {self.skipped[path]}" for path in self.skipped_in(item)]
        return [*skipped, *(f"{path} is trained in full (modules_to_save)" for path in self.trained_in(item))]

    def value(self, path: str) -> str:
        """A line of a tooltip: an adapted layer, with its value if a heatmap is shown."""
        if self.heatmap is None:
            return path
        return f"{path} · {self.heatmap.text(self.heatmap.mean([path]))}"

    def strip(self, item: Item) -> tuple[str, str]:
        """Text and color of the mean value in a box; empty without a heatmap or an adapted layer."""
        if self.heatmap is None or not item.marks:
            return "", ""
        mean = self.heatmap.mean(mark.path for mark in item.marks)
        words = ("" if HEATS[self.heatmap.name].unit else "|Q-I| ") + self.heatmap.text(mean)
        return (f"mean {words}" if len(item.marks) > 1 else words), self.heatmap.color(mean)

    def cells(self, item: Item, width: float) -> Cells:
        """One cell for each adapted layer in a box. If the box stands for several modules, each has a column.

        Args:
            item: what the box stands for.
            width: width of the grid.
        """
        if self.heatmap is None or not item.marks:
            return NO_CELLS
        paths = [mark.path for mark in item.marks]
        fitting = max(int(width / _NARROWEST), 1)
        columns = item.count if 1 < item.count <= fitting else ceil(len(paths) / ceil(len(paths) / fitting))
        colors = tuple(self.heatmap.color(self.heatmap.values.get(path, float("nan"))) for path in paths)
        return Cells(colors, tuple(clean(self.value(path)) for path in paths), columns)


def annotations_of(drawing: Drawing, heatmap: Heatmap | None = None, *, wide: bool = False) -> Annotations:
    """The annotations of a drawing."""
    return Annotations(heatmap, drawing.skipped, drawing.trained_in_full, wide)


def _by_module(layers: Iterable[str]) -> dict[str, list[str]]:
    """Path of a module -> the layers that it is or contains."""
    below: dict[str, list[str]] = {}
    for path in layers:
        parts = path.split(".")
        for end in range(len(parts)):
            below.setdefault(".".join(parts[: end + 1]), []).append(path)
    return below


def _in(item: Item, below: Mapping[str, list[str]], layers: Iterable[str]) -> Iterator[str]:
    if isinstance(item, Leaf):
        for path in item.paths:
            yield from below.get(path, ())
        # A graph of operators has no boxes of modules: a layer is shown where its parameters are read.
        yield from (path for path in item.readers if path in layers)
    else:
        for part in item.items:
            yield from _in(part, below, layers)
