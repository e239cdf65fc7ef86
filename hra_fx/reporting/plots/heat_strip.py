"""The heat strip: how far each layer is turned, by projection and block, on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hra_fx.errors import VisualizeError
from hra_fx.reporting.columns import adapters_of
from hra_fx.reporting.plots.canvas import GRID, INK, QUIET, check_plot, new_figure, shown, style, write
from hra_fx.reporting.plots.grid import Grid, grid_of
from hra_fx.reporting.plots.measures import Measure, measure_of, number, round_top
from hra_fx.reporting.row import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches. Cells are as wide as the number in them takes, until there are too many for a page.
_WIDE, _NARROW, _HIGH, _PAGE = 0.42, 0.15, 0.3, 14.0
_UNKNOWN = "#eceff1"


def draw_heat_strip(rows: Sequence[Row], path: str | os.PathLike[str], heat: str, adapter: str | None) -> Path:
    """Write the strip of some rows; see `Report.heat_strip`.

    Raises:
        VisualizeError: another ending, field or adapter, no such folder, or matplotlib is not installed.
    """
    file = check_plot(path)
    measure = measure_of(heat)
    known = adapters_of(rows)
    if adapter is not None and adapter not in known:
        raise VisualizeError(f"adapter: {adapter!r} is not in the report. It has {', '.join(map(repr, known))}.")
    used = [row for row in rows if adapter in (None, row.adapter)]
    values = _largest(used, measure)
    strip = _Strip(grid_of(values), values, round_top(values.values()), measure)
    names = adapters_of(used)
    title = f"{measure.title[0].upper()}{measure.title[1:]} by layer"
    subtitle = f"adapter {names[0]}" if len(names) == 1 else f"the largest of adapters {', '.join(names)}"
    with style():
        return write(_figure(strip, title, shown(subtitle)), file)


class _Strip(NamedTuple):
    """What is drawn: layers in a grid, their values, the end of the scale."""

    grid: Grid
    values: dict[str, float]
    top: float
    measure: Measure

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


def _largest(rows: Sequence[Row], measure: Measure) -> dict[str, float]:
    """The value of each layer, the largest of its adapters; NaN where none has one."""
    values: dict[str, float] = {}
    for row in rows:
        value, before = measure.value(row), values.get(row.path, math.nan)
        values[row.path] = value if math.isnan(before) else before if math.isnan(value) else max(value, before)
    return values


def _figure(strip: _Strip, title: str, subtitle: str) -> object:
    figure = new_figure(strip.width, strip.height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, len(strip.grid.blocks))
    axes.set_ylim(len(strip.grid.projections), 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_yticks([row + 0.5 for row in range(len(strip.grid.projections))], list(map(shown, strip.grid.projections)))
    _cells(axes, strip)
    depth = _labels(axes, strip)
    above = (0, 1), "axes fraction"
    axes.annotate(title, *above, (0, 24), textcoords="offset points", fontsize=11, fontweight="bold")
    axes.annotate(subtitle, *above, (0, 9), textcoords="offset points", color=QUIET)
    _legend(axes, strip, depth)
    return figure


def _cells(axes: Axes, strip: _Strip) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["cividis"]
    for path, (row, column) in strip.grid.places.items():
        value = strip.values[path]
        known = math.isfinite(value)
        colour = colours(min(value / strip.top, 1.0)) if known else _UNKNOWN
        hatch = {} if known else {"hatch": "/////", "edgecolor": "#9aa4ae"}
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, linewidth=0, **hatch))
        if known and strip.cell >= 0.35:
            ink = ink_on(colour[:3])
            place = (column + 0.5, row + 0.5)
            axes.text(*place, number(value), ha="center", va="center", fontsize=7.5, color=ink)
    axes.hlines(range(len(strip.grid.projections) + 1), 0, len(strip.grid.blocks), colors="white", linewidth=1)
    fine = 1 if strip.cell > 2 * _NARROW else 0.4
    axes.vlines(range(len(strip.grid.blocks) + 1), 0, len(strip.grid.projections), colors="white", linewidth=fine)


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is read better on a colour; the contrast is 4.5 at least (WCAG 2).

    >>> ink_on((1.0, 1.0, 1.0)), ink_on((0.0, 0.13, 0.3))
    ('black', 'white')
    """
    return "black" if (luminance(colour) + 0.05) / 0.05 >= 1.05 / (luminance(colour) + 0.05) else "white"


def luminance(colour: tuple[float, ...]) -> float:
    """The relative luminance of WCAG 2 of red, green and blue from 0 to 1.

    >>> luminance((1.0, 1.0, 1.0))
    1.0
    """
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _labels(axes: Axes, strip: _Strip) -> float:
    """Name the columns; gives the points below the cells that it took."""
    stacks: dict[str, list[int]] = {}
    for column, (stack, _) in enumerate(strip.grid.blocks):
        stacks.setdefault(stack, []).append(column)
    fits = all(_inches(stack, 8) <= strip.cell * len(columns) + 0.1 for stack, columns in stacks.items())
    if not fits and len(stacks) > 1:
        names = [shown(".".join(filter(None, block)) or "in no block", 48) for block in strip.grid.blocks]
        axes.set_xticks([column + 0.5 for column in range(len(names))], names, rotation=90, fontsize=7.5)
        return 72 * max(_inches(name, 7.5) for name in names) + 8
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10_000) if step * strip.cell >= 0.2)
    marked = [column for columns in stacks.values() for column in columns[::step]]
    texts = [strip.grid.blocks[column][1] or "-" for column in marked]
    axes.set_xticks([column + 0.5 for column in marked], texts, fontsize=8)
    for stack, columns in stacks.items():
        if stack:
            _bracket(axes, shown(stack), columns[0], columns[-1] + 1)
    return 34 if any(stacks) else 18


def _bracket(axes: Axes, name: str, start: int, end: int) -> None:
    """A line below the columns of a stack, and its name."""
    across = axes.get_xaxis_transform()
    below = axes.annotate(
        name,
        ((start + end) / 2, 0),
        (0, -20),
        xycoords=across,
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        color=QUIET,
    )
    below.set_in_layout(True)
    for place, other in ((start + 0.1, end - 0.1),):
        axes.annotate(
            "",
            (place, 0),
            (other, 0),
            xycoords=across,
            textcoords=across,
            arrowprops={"arrowstyle": "-", "color": GRID, "shrinkA": 0, "shrinkB": 0},
        )


def _inches(text: str, size: float) -> float:
    return 0.6 * size / 72 * len(text)


def _legend(axes: Axes, strip: _Strip, depth: float) -> None:
    """The scale, below what names the columns, and what cells without a colour mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    figure = axes.figure
    wide, high = strip.width, strip.height
    scale = axes.inset_axes((0, -(depth / 72 + 0.3) / high, 2.2 / wide, 0.11 / high))
    bar = figure.colorbar(ScalarMappable(Normalize(0, strip.top), "cividis"), cax=scale, orientation="horizontal")
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_ticks([0, strip.top / 2, strip.top], labels=[_tick(part * strip.top, strip) for part in (0, 0.5, 1)])
    bar.ax.tick_params(length=0, labelsize=8)
    notes = []
    if len(strip.grid.places) < len(strip.grid.projections) * len(strip.grid.blocks):
        notes.append(("white", "", "no adapter"))
    if not all(map(math.isfinite, strip.values.values())):
        notes.append((_UNKNOWN, "/////", "no number"))
    for place, (colour, hatch, text) in enumerate(notes):
        left = 2.6 + 1.1 * place
        box = Rectangle((left / 2.2, 0), 0.16 / 2.2, 1.4, transform=scale.transAxes, clip_on=False, hatch=hatch)
        box.set(facecolor=colour, edgecolor="#9aa4ae", linewidth=0.6)
        scale.add_artist(box)
        scale.text((left + 0.24) / 2.2, 0.6, text, transform=scale.transAxes, va="center", fontsize=8, color=INK)


def _tick(value: float, strip: _Strip) -> str:
    return f"{value:.3g}{strip.measure.unit}"
