"""The heat strip: how far each layer is turned, by projection and block, on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hra_fx.errors import VisualizeError
from hra_fx.reporting.colormap import PALETTE, UNKNOWN, colour, ink_on
from hra_fx.reporting.columns import adapters_of
from hra_fx.reporting.heat import Heat, heat_named, heat_of, scale
from hra_fx.reporting.plots.block_labels import label_blocks
from hra_fx.reporting.plots.canvas import INK, check_plot, entitle, new_figure, shown, style, write
from hra_fx.reporting.plots.grid import Grid, grid_of
from hra_fx.reporting.plots.numbers import number
from hra_fx.reporting.row import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. Cells are as wide as the number in them takes, until there are too many for a page.
_WIDE, _NARROW, _HIGH, _PAGE = 0.42, 0.15, 0.3, 14.0


def draw_heat_strip(rows: Sequence[Row], path: str | os.PathLike[str], heat: str, adapter: str | None) -> Path:
    """Write the strip of some rows; see `Report.heat_strip`.

    Raises:
        VisualizeError: another ending, field or adapter, no such folder, or matplotlib is not installed.
    """
    file = check_plot(path)
    measure = heat_named(heat)
    known = adapters_of(rows)
    if adapter is not None and adapter not in known:
        raise VisualizeError(f"adapter: {adapter!r} is not in the report. It has {', '.join(map(repr, known))}.")
    if not rows:
        raise VisualizeError("rows: the report is empty, so there is nothing to draw.")
    used = [row for row in rows if adapter in (None, row.adapter)]
    values = heat_of(used, heat)
    strip = _Strip(grid_of(values), values, scale(values.values()), measure)
    names = adapters_of(used)
    title = f"{measure.words[0].upper()}{measure.words[1:]} by layer"
    subtitle = f"adapter {names[0]}" if len(names) == 1 else f"the largest of adapters {', '.join(names)}"
    with style():
        return write(_figure(strip, title, shown(subtitle)), file)


class _Strip(NamedTuple):
    """What is drawn: layers in a grid, their values, the end of the scale."""

    grid: Grid
    values: dict[str, float]
    top: float
    measure: Heat

    @property
    def cell(self) -> float:
        """How wide a cell is."""
        return min(_WIDE, max(_NARROW, _PAGE / max(1, len(self.grid.blocks))))

    @property
    def width(self) -> float:
        return self.cell * len(self.grid.blocks)

    @property
    def height(self) -> float:
        return _HIGH * len(self.grid.projections)


def _figure(strip: _Strip, title: str, subtitle: str) -> Figure:
    figure = new_figure(strip.width, strip.height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, len(strip.grid.blocks))
    axes.set_ylim(len(strip.grid.projections), 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_yticks([row + 0.5 for row in range(len(strip.grid.projections))], list(map(shown, strip.grid.projections)))
    _cells(axes, strip)
    depth = label_blocks(axes, strip.grid.blocks, strip.cell)
    entitle(axes, title, subtitle)
    _legend(axes, strip, depth)
    return figure


def _cells(axes: Axes, strip: _Strip) -> None:
    from matplotlib.patches import Rectangle

    for path, (row, column) in strip.grid.places.items():
        value = strip.values[path]
        known = math.isfinite(value)
        fill = colour(value, strip.top)
        box = Rectangle((column, row), 1, 1, facecolor=fill, linewidth=0)
        if not known:
            box.set(hatch="/////", edgecolor="#9aa4ae")
        axes.add_patch(box)
        if known and strip.cell >= 0.35:
            ink = ink_on(fill)
            place = (column + 0.5, row + 0.5)
            axes.text(*place, number(value), ha="center", va="center", fontsize=7.5, color=ink)
    axes.hlines(range(len(strip.grid.projections) + 1), 0, len(strip.grid.blocks), colors="white", linewidth=1)
    fine = 1 if strip.cell > 2 * _NARROW else 0.4
    axes.vlines(range(len(strip.grid.blocks) + 1), 0, len(strip.grid.projections), colors="white", linewidth=fine)


def _legend(axes: Axes, strip: _Strip, depth: float) -> None:
    """The scale, below what names the columns, and what cells without a colour mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    figure = axes.figure
    wide, high = strip.width, strip.height
    colours = LinearSegmentedColormap.from_list("heat", PALETTE)
    ramp = axes.inset_axes((0, -(depth / 72 + 0.3) / high, 2.2 / wide, 0.11 / high))
    bar = figure.colorbar(ScalarMappable(Normalize(0, strip.top), colours), cax=ramp, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.set_ticks([0, strip.top / 2, strip.top], labels=[_tick(part * strip.top, strip) for part in (0, 0.5, 1)])
    bar.ax.tick_params(length=0, labelsize=8)
    notes = []
    if len(strip.grid.places) < len(strip.grid.projections) * len(strip.grid.blocks):
        notes.append(("white", "", "no adapter"))
    if not all(map(math.isfinite, strip.values.values())):
        notes.append((UNKNOWN, "/////", "no number"))
    for place, (fill, hatch, text) in enumerate(notes):
        left = 2.6 + 1.1 * place
        box = Rectangle((left / 2.2, 0), 0.16 / 2.2, 1.4, transform=ramp.transAxes, clip_on=False, hatch=hatch)
        box.set(facecolor=fill, edgecolor="#9aa4ae", linewidth=0.6)
        ramp.add_artist(box)
        ramp.text((left + 0.24) / 2.2, 0.6, text, transform=ramp.transAxes, va="center", fontsize=8, color=INK)


def _tick(value: float, strip: _Strip) -> str:
    return f"{value:.3g}{strip.measure.unit}"
