"""What a picture shows of its boxes besides what they are: how far layers are rotated, and which were skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from hra_fx.reporting.heat import HEATS
from hra_fx.view.heatmap import Heatmap
from hra_fx.view.text import clean
from hra_fx.view.tree import Item, Leaf

CELL = 8.0  # height of a row of heat cells
_NARROWEST = 3.0  # width of a cell


@dataclass(frozen=True)
class Cells:
    """A field of colored cells, one for each site in a box, row by row.

    Attributes:
        colors: their fills.
        tips: what a reader sees who points at one.
        columns: how many stand in a row.
    """

    colors: tuple[str, ...] = ()
    tips: tuple[str, ...] = ()
    columns: int = 1

    @property
    def height(self) -> float:
        """Of the rows, and the space above them."""
        return ceil(len(self.colors) / self.columns) * CELL + 5 if self.colors else 0.0


NO_CELLS = Cells()


@dataclass(frozen=True)
class Annotations:
    """The notes of a picture.

    Attributes:
        heatmap: the heat, if it is on.
        skipped: path of a layer that could carry reflections, and does not -> why.
        wide: whether a model that stays Python may take the width of a whole page.
    """

    heatmap: Heatmap | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False

    @cached_property
    def _below(self) -> dict[str, list[str]]:
        """A module -> the skipped layers that it is or has."""
        below: dict[str, list[str]] = {}
        for path in self.skipped:
            parts = path.split(".")
            for end in range(len(parts)):
                below.setdefault(".".join(parts[: end + 1]), []).append(path)
        return below

    def skipped_in(self, item: Item) -> list[str]:
        """The skipped layers that a box stands for, each once."""
        return list(dict.fromkeys(self._skipped(item)))

    def _skipped(self, item: Item) -> Iterable[str]:
        if isinstance(item, Leaf):
            for path in item.paths:
                yield from self._below.get(path, ())
            # A graph of operators has no boxes of modules: a layer is where its parameters are read.
            yield from (path for path in item.readers if path in self.skipped)
        else:
            for part in item.items:
                yield from self._skipped(part)

    def reasons(self, skipped: Iterable[str]) -> list[str]:
        """Lines of a tip that tell why layers were skipped."""
        return [f"{path} has no adapter: {self.skipped[path]}" for path in skipped]

    def value(self, path: str) -> str:
        """A line of a tip: a site, with its heat where that is on."""
        if self.heatmap is None:
            return path
        return f"{path} · {self.heatmap.text(self.heatmap.mean([path]))}"

    def strip(self, item: Item) -> tuple[str, str]:
        """Words and color of the heat of all sites in a box; nothing where it is off, or there is no site."""
        if self.heatmap is None or not item.marks:
            return "", ""
        mean = self.heatmap.mean(mark.path for mark in item.marks)
        words = ("" if HEATS[self.heatmap.name].unit else "|Q-I| ") + self.heatmap.text(mean)
        return (f"mean {words}" if len(item.marks) > 1 else words), self.heatmap.color(mean)

    def cells(self, item: Item, width: float) -> Cells:
        """One cell for each site in a box. Of modules that repeat, a column shows one of them.

        Args:
            item: what the box stands for.
            width: how wide the field is.
        """
        if self.heatmap is None or not item.marks:
            return NO_CELLS
        paths = [mark.path for mark in item.marks]
        fitting = max(int(width / _NARROWEST), 1)
        columns = item.count if 1 < item.count <= fitting else ceil(len(paths) / ceil(len(paths) / fitting))
        colors = tuple(self.heatmap.color(self.heatmap.values.get(path, float("nan"))) for path in paths)
        return Cells(colors, tuple(clean(self.value(path)) for path in paths), columns)
