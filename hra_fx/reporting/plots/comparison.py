"""Two adapters side by side: their mean and largest angles, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hra_fx.errors import VisualizeError
from hra_fx.reporting.columns import adapters_of
from hra_fx.reporting.heat import HEATS, Heat, scale
from hra_fx.reporting.plots.canvas import GRID, QUIET, check_plot, entitle, new_figure, shown, style, write
from hra_fx.reporting.row import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange of Okabe and Ito, safe for color blindness; the markers differ too.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "D"))
_PANEL, _GAP = 3.2, 0.35


def draw_comparison(rows: Sequence[Row], path: str | os.PathLike[str], first: str, second: str) -> Path:
    """Write the plot of two adapters; see `Report.plot_comparison`.

    Raises:
        VisualizeError: unknown file ending or adapter, no such folder, or matplotlib is not installed.
    """
    file = check_plot(path)
    known = adapters_of(rows)
    for name in (first, second):
        if name not in known:
            raise VisualizeError(f"Adapter {name!r} is not in the report, which has {', '.join(map(repr, known))}.")
    if first == second:
        raise VisualizeError(f"The two adapters must be different, got {first!r} twice.")
    with style():
        return write(_figure(rows, (first, second)), file)


def _figure(rows: Sequence[Row], names: tuple[str, str]) -> Figure:
    used = [row for row in rows if row.adapter in names]
    paths = list(dict.fromkeys(row.path for row in used))
    line = 0.2 if len(paths) > 40 else 0.26
    high, wide = max(0.6, line * len(paths)), 2 * _PANEL + _GAP
    figure = new_figure(wide, high)
    measures = [HEATS[heat] for heat in ("mean_angle", "angle")]
    _, top = scale([0.0, *(measure.value(row) for measure in measures for row in used)])
    for place, measure in enumerate(measures):
        left = place * (_PANEL + _GAP) / wide
        axes = figure.add_axes((left, 0, _PANEL / wide, 1))
        axes.set_xlim(0, top)
        _panel(axes, used, paths, names, measure)
        axes.set_yticks(range(len(paths)), [shown(path) for path in paths] if not place else [""] * len(paths))
    axes = figure.axes[0]
    title = f"{shown(names[0], 40)} and {shown(names[1], 40)}"
    entitle(axes, title, points=52)
    place_above = (-0.03, 1 + 0.4 / high)
    axes.legend(loc="lower left", bbox_to_anchor=place_above, ncols=2, frameon=False, borderpad=0, handletextpad=0.2)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], paths: list[str], names: tuple[str, str], measure: Heat) -> None:
    """Two markers for each layer, joined by a line."""
    values = {name: {row.path: measure.value(row) for row in rows if row.adapter == name} for name in names}
    for place, path in enumerate(paths):
        ends = [values[name].get(path, math.nan) for name in names]
        if all(map(math.isfinite, ends)):
            axes.plot(ends, [place, place], color="#9aa4ae", linewidth=1.2, zorder=1)
    for name, (color, mark) in zip(names, _LOOKS, strict=True):
        known = [(value, paths.index(path)) for path, value in values[name].items() if math.isfinite(value)]
        label = shown(name, 40)
        axes.scatter(
            [value for value, _ in known],
            [place for _, place in known],
            s=26,
            color=color,
            marker=mark,
            label=label,
            zorder=2,
            clip_on=False,
        )
    axes.set_ylim(len(paths) - 0.5, -0.5)
    axes.set_title(f"{measure.words}, degrees", loc="left", fontsize=9, color=QUIET)
    # In a long list only one end is visible at a time.
    axes.tick_params(length=0, labeltop=len(paths) > 30)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
