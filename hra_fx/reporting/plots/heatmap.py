"""A heatmap of how far each layer is rotated: a row for each projection, a column for each block."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hra_fx.errors import VisualizeError
from hra_fx.reporting.colormap import PALETTE, UNKNOWN, color, ink_on
from hra_fx.reporting.columns import adapters_of
from hra_fx.reporting.heat import Heat, default_heat, heat_named, heat_of, scale
from hra_fx.reporting.plots.block_labels import label_blocks
from hra_fx.reporting.plots.canvas import INK, check_plot, entitle, new_figure, short_number, shown, style, write
from hra_fx.reporting.plots.grid import Grid, grid_of
from hra_fx.reporting.row import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. Cells are wide enough for a number, until there are too many for a page.
_WIDE, _NARROW, _HIGH, _PAGE = 0.42, 0.15, 0.3, 14.0


def draw_heatmap(rows: Sequence[Row], path: str | os.PathLike[str], heat: str | None, adapter: str | None) -> Path:
    """Write the heatmap of some rows; see `Report.plot_heatmap`.

    Raises:
        VisualizeError: unknown file ending, field or adapter, no such folder, or matplotlib is not installed.
    """
    file = check_plot(path)
    measure = heat_named(default_heat(rows) if heat is None else heat)
    known = adapters_of(rows)
    if adapter is not None and adapter not in known:
        raise VisualizeError(f"`adapter` must be one of {', '.join(map(repr, known))}, got {adapter!r}.")
    if not rows:
        raise VisualizeError("The report has no rows to plot.")
    used = [row for row in rows if adapter in (None, row.adapter)]
    values = heat_of(used, measure.field)
    grid = _Heatmap(grid_of(values), values, scale(values.values()), measure)
    names = adapters_of(used)
    title = f"{measure.words[0].upper()}{measure.words[1:]} by layer"
    subtitle = f"adapter {names[0]}" if len(names) == 1 else f"largest of adapters {', '.join(names)}"
    with style():
        return write(_figure(grid, title, shown(subtitle)), file)


class _Heatmap(NamedTuple):
    """The layers in a grid, their values, and the ends of the scale."""

    layout: Grid
    values: dict[str, float]
    ends: tuple[float, float]
    measure: Heat

    @property
    def cell(self) -> float:
        """Width of a cell."""
        return min(_WIDE, max(_NARROW, _PAGE / max(1, len(self.layout.blocks))))

    @property
    def width(self) -> float:
        return self.cell * len(self.layout.blocks)

    @property
    def height(self) -> float:
        return _HIGH * len(self.layout.projections)


def _figure(grid: _Heatmap, title: str, subtitle: str) -> Figure:
    figure = new_figure(grid.width, grid.height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, len(grid.layout.blocks))
    axes.set_ylim(len(grid.layout.projections), 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_yticks(
        [row + 0.5 for row in range(len(grid.layout.projections))], list(map(shown, grid.layout.projections))
    )
    _cells(axes, grid)
    depth = label_blocks(axes, grid.layout.blocks, grid.cell)
    entitle(axes, title, subtitle)
    _legend(axes, grid, depth)
    return figure


def _cells(axes: Axes, grid: _Heatmap) -> None:
    from matplotlib.patches import Rectangle

    for path, (row, column) in grid.layout.places.items():
        value = grid.values[path]
        known = math.isfinite(value)
        fill = color(value, grid.ends)
        box = Rectangle((column, row), 1, 1, facecolor=fill, linewidth=0)
        if not known:
            box.set(hatch="/////", edgecolor="#9aa4ae")
        axes.add_patch(box)
        if known and grid.cell >= 0.35:
            ink = ink_on(fill)
            place = (column + 0.5, row + 0.5)
            axes.text(*place, short_number(value), ha="center", va="center", fontsize=7.5, color=ink)
    axes.hlines(range(len(grid.layout.projections) + 1), 0, len(grid.layout.blocks), colors="white", linewidth=1)
    fine = 1 if grid.cell > 2 * _NARROW else 0.4
    axes.vlines(range(len(grid.layout.blocks) + 1), 0, len(grid.layout.projections), colors="white", linewidth=fine)


def _legend(axes: Axes, grid: _Heatmap, depth: float) -> None:
    """The scale below the names of the columns, and the meaning of cells without a color."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    figure = axes.figure
    wide, high = grid.width, grid.height
    colors = LinearSegmentedColormap.from_list("heat", PALETTE)
    ramp = axes.inset_axes((0, -(depth / 72 + 0.3) / high, 2.2 / wide, 0.11 / high))
    bar = figure.colorbar(ScalarMappable(Normalize(*grid.ends), colors), cax=ramp, orientation="horizontal")
    bar.outline.set_visible(False)
    ticks = [grid.ends[0], sum(grid.ends) / 2, grid.ends[1]]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}{grid.measure.unit}" for tick in ticks])
    bar.ax.tick_params(length=0, labelsize=8)
    notes = []
    if len(grid.layout.places) < len(grid.layout.projections) * len(grid.layout.blocks):
        notes.append(("white", "", "no adapter"))
    if not all(map(math.isfinite, grid.values.values())):
        notes.append((UNKNOWN, "/////", "unknown"))
    for place, (fill, hatch, text) in enumerate(notes):
        left = 2.6 + 1.1 * place
        box = Rectangle((left / 2.2, 0), 0.16 / 2.2, 1.4, transform=ramp.transAxes, clip_on=False, hatch=hatch)
        box.set(facecolor=fill, edgecolor="#9aa4ae", linewidth=0.6)
        ramp.add_artist(box)
        ramp.text((left + 0.24) / 2.2, 0.6, text, transform=ramp.transAxes, va="center", fontsize=8, color=INK)
