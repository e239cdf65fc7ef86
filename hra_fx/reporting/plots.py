"""Plots of adapters with matplotlib (an optional dependency): all layers, two adapters, and the course of training."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hra_fx.atomic_write import output_file, write_output_file
from hra_fx.errors import VisualizeError
from hra_fx.reporting.columns import adapters_of, indices, starred
from hra_fx.reporting.heat import (
    HEATS,
    PALETTE,
    UNKNOWN,
    Heat,
    color,
    default_heat,
    heat_named,
    heat_of,
    ink_on,
    scale,
    shorten,
)
from hra_fx.reporting.row import Progress, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
INK, QUIET, GRID = "#1f2328", "#59636e", "#d8dee4"
#: The colors of Okabe and Ito that are readable on white and safe for color blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: Leave out the date and matplotlib's version, so that equal values give equal files.
_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "hra_fx",
    "svg.fonttype": "none",  # text as text, so that it can be searched and read by screen readers
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.parse_math": False,  # names from a model are not formulas
}


def check_plot(path: str | os.PathLike[str]) -> Path:
    """Check the path of a plot, and that matplotlib is installed, before the work starts."""
    file = output_file(path, FORMATS)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise VisualizeError(
            "Plots need matplotlib, which is not installed. Run: pip install matplotlib. Without it, "
            "print(hra_fx.report(model)) or its to_json() give the same values, and hra_fx.visualize draws them."
        ) from error
    return file


def style() -> Any:
    """The rc context for creating and writing figures."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)  # type: ignore[arg-type]


def new_figure(width: float, height: float) -> Figure:
    """Create an empty white figure outside of matplotlib's global state; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def entitle(axes: Axes, title: str, subtitle: str = "", points: int = 8) -> None:
    """Add a heading above the axes and a line below it, both aligned with the left end of the axes."""
    lines: list[tuple[str, dict[str, Any]]] = [(title, {"fontsize": 11, "fontweight": "bold"})]
    if subtitle:
        lines.append((subtitle, {"color": QUIET}))
    for place, (text, look) in enumerate(reversed(lines)):
        shift = (0, points + 16 * place)
        axes.annotate(text, (0, 1), shift, xycoords="axes fraction", textcoords="offset points", **look)


def write(figure: Figure, file: Path) -> Path:
    """Write a figure, cropped to its content, atomically."""
    ending, buffer = file.suffix.lower(), io.BytesIO()
    with warnings.catch_warnings():
        # A missing glyph is drawn as a box; in an SVG, the reader's fonts draw it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(
            buffer, format=ending[1:], dpi=160, bbox_inches="tight", pad_inches=0.15, metadata=_METADATA[ending]
        )
    write_output_file(file, buffer.getvalue())
    return file


def draw_heatmap(rows: Sequence[Row], path: str | os.PathLike[str], heat: str | None, adapter: str | None) -> Path:
    """Write the heatmap of some rows; see `Report.plot_heatmap`."""
    file = check_plot(path)
    measure = heat_named(default_heat(rows) if heat is None else heat)
    known = adapters_of(rows)
    if adapter is not None and adapter not in known:
        raise VisualizeError(f"`adapter` must be one of {', '.join(map(repr, known))}, got {adapter!r}.")
    if not rows:
        raise VisualizeError("The report has no rows to plot.")
    used = [row for row in rows if adapter in (None, row.adapter)]
    names = adapters_of(used)
    subtitle = f"adapter {names[0]}" if len(names) == 1 else f"largest of adapters {', '.join(names)}"
    with style():
        return write(_heatmap(heat_of(used, measure.field), measure, _shown(subtitle)), file)


def _heatmap(values: dict[str, float], measure: Heat, subtitle: str) -> Figure:
    """Each line has the layers that differ only in the indices of their blocks, which are the columns."""
    names = list(dict.fromkeys(map(starred, values)))
    blocks = list(dict.fromkeys(map(indices, values)))
    cell = min(0.42, max(0.15, 14 / len(blocks)))
    figure, ends = new_figure(cell * len(blocks), 0.3 * len(names)), scale(values.values())
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, len(blocks)), ylim=(len(names), 0))
    for path, value in values.items():
        x, y, fill = blocks.index(indices(path)), names.index(starred(path)), color(value, ends)
        axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], facecolor=fill, edgecolor="white", linewidth=0.6)
        if cell >= 0.35:
            text = f"{value:.2g}" if value < 100 else f"{value:.0f}"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=ink_on(fill))
    step = math.ceil(0.2 / cell)
    axes.set_xticks([column + 0.5 for column in range(0, len(blocks), step)], blocks[::step])
    axes.set_yticks([line + 0.5 for line in range(len(names))], list(map(_shown, names)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    entitle(axes, f"{measure.words[0].upper()}{measure.words[1:]} by layer", subtitle)
    _color_bar(figure, ends, measure.unit, unknown=not all(map(math.isfinite, values.values())))
    return figure


def _color_bar(figure: Figure, ends: tuple[float, float], unit: str, *, unknown: bool) -> None:
    """Draw the scale to the right of the heatmap."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    (axes,), (width, height) = figure.axes, figure.get_size_inches()
    colors = ScalarMappable(Normalize(*ends), LinearSegmentedColormap.from_list("heat", PALETTE))
    bar = figure.colorbar(colors, cax=axes.inset_axes((1 + 0.15 / width, 1 - 1.2 / height, 0.12 / width, 1.2 / height)))
    bar.set_ticks(ends, labels=[f"{end:.3g}{unit}" for end in ends])
    if unknown:
        bar.ax.set_xlabel("unknown", backgroundcolor=UNKNOWN, fontsize=8)


def draw_comparison(rows: Sequence[Row], path: str | os.PathLike[str], first: str, second: str) -> Path:
    """Write the plot of two adapters; see `Report.plot_comparison`."""
    file = check_plot(path)
    known = adapters_of(rows)
    for name in (first, second):
        if name not in known:
            raise VisualizeError(f"Adapter {name!r} is not in the report, which has {', '.join(map(repr, known))}.")
    if first == second:
        raise VisualizeError(f"The two adapters must be different, got {first!r} twice.")
    paths = list(dict.fromkeys(row.path for row in rows if row.adapter in (first, second)))
    with style():
        figure = new_figure(7.5, max(1.2, 0.25 * len(paths)))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, measure in zip(panels, (HEATS["mean_angle"], HEATS["angle"]), strict=True):
            for name, tint, marker in ((first, _COLORS[0], "o"), (second, _COLORS[1], "D")):
                values = {row.path: measure.value(row) for row in rows if row.adapter == name}
                places = [paths.index(path) for path in values]
                axes.plot(list(values.values()), places, marker, color=tint, markersize=5, label=_shown(name))
            _quiet(axes, f"{measure.words}, degrees", "x")
        panels[0].set_yticks(range(len(paths)), list(map(_shown, paths)))
        panels[0].set_ylim(len(paths) - 0.5, -0.5)
        panels[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
        return write(figure, file)


def draw_training(history: Sequence[Progress], path: str | os.PathLike[str]) -> Path:
    """Write a plot of training: the mean and the largest angle of each adapter by step, and the error of `Q`."""
    file = check_plot(path)
    if not history:
        raise VisualizeError("`history` is empty. Train with a RotationCallback first.")
    with style():
        figure = new_figure(7.5, 5.5)
        angles, errors = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
        for place, adapter in enumerate(dict.fromkeys(point.adapter for point in history)):
            points = [point for point in history if point.adapter == adapter]
            look = {"color": _COLORS[place % len(_COLORS)], "marker": "." if len(points) < 30 else ""}
            steps, name = [point.step for point in points], _shown(adapter)
            angles.plot(steps, [math.degrees(point.mean_angle) for point in points], label=f"{name}, mean", **look)
            angles.plot(steps, [math.degrees(point.angle) for point in points], ":", label=f"{name}, largest", **look)
            errors.plot(steps, [point.orthogonality for point in points], **look)
        _quiet(angles, "rotation angles, degrees", "y")
        _quiet(errors, "largest |Q'Q - I| (rounding error)", "y")
        errors.yaxis.set_major_formatter("{x:.1e}")  # matplotlib's default writes powers of ten as formulas
        errors.set_xlabel("step")
        angles.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
        return write(figure, file)


def _quiet(axes: Axes, title: str, grid: Any) -> None:
    """Set a title on the left, an axis from zero with grid lines, and no frame."""
    axes.set_title(title, loc="left", fontsize=9, color=QUIET)
    axes.set(**{f"{grid}lim": (0, None)})
    axes.grid(axis=grid)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _shown(text: str) -> str:
    """A name from a model as a label: one short line."""
    return shorten(" ".join(text.split()), 56)
