"""Angles over a training: mean and largest angle of each adapter by step, and the orthogonality error of `Q`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hra_fx.errors import VisualizeError
from hra_fx.reporting.plots.canvas import GRID, QUIET, check_plot, entitle, new_figure, shown, style, write
from hra_fx.reporting.progress import Progress, adapters_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors that are readable on white, safe for color blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_WIDE, _HIGH, _LOW = 6.4, 2.8, 1.1


def draw_training(history: Sequence[Progress], path: str | os.PathLike[str]) -> Path:
    """Write the plot of a training.

    Args:
        history: the points in the order of steps.
        path: the file, ending in `.svg`, `.png` or `.pdf`; its folder must exist.

    Raises:
        VisualizeError: unknown file ending, no such folder, an empty history, or matplotlib is not installed.
    """
    file = check_plot(path)
    if not history:
        raise VisualizeError("`history` is empty. Train with a RotationCallback first.")
    with style():
        return write(_figure(history), file)


def _figure(history: Sequence[Progress]) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    total = _HIGH + _LOW + 0.55
    figure = new_figure(_WIDE, total)
    angles = figure.add_axes((0, 1 - _HIGH / total, 1, _HIGH / total))
    errors = figure.add_axes((0, 0, 1, _LOW / total), sharex=angles)
    for place, adapter in enumerate(adapters_in(history)):
        points = [point for point in history if point.adapter == adapter]
        color, name = _COLORS[place % len(_COLORS)], shown(adapter, 40)
        _line(angles, points, lambda point: math.degrees(point.mean_angle), color, "-", f"{name}, mean")
        _line(angles, points, lambda point: math.degrees(point.angle), color, ":", f"{name}, largest")
        _line(errors, points, lambda point: point.orthogonality, color, "-", "")
    angles.set_ylim(bottom=0)
    errors.set_ylim(bottom=0)
    errors.yaxis.set_major_locator(MaxNLocator(3))
    # Not matplotlib's own formatter, which writes powers of ten as formulas.
    errors.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    errors.set_xlabel("step")
    entitle(angles, "Rotation angles during training", "degrees")
    errors.set_title("largest |Q'Q - I| (rounding error)", loc="left", fontsize=9, color=QUIET)
    for axes in (angles, errors):
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    angles.tick_params(labelbottom=False)
    angles.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    errors.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _line(
    axes: Axes, points: Sequence[Progress], value: Callable[[Progress], float], color: str, dashes: str, label: str
) -> None:
    mark = "o" if len(points) < 30 else ""
    steps, values = [point.step for point in points], [value(point) for point in points]
    axes.plot(steps, values, color=color, linestyle=dashes, linewidth=1.6, marker=mark, markersize=3.5, label=label)
