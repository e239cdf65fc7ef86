"""The heatmap of a report, with matplotlib (an optional dependency)."""

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
    PALETTE,
    UNKNOWN,
    Heat,
    color,
    default_heat,
    heat_named,
    heat_of,
    ink_on,
    scale,
)
from hra_fx.reporting.row import Row
from hra_fx.reporting.words import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
INK, QUIET, GRID = "#1f2328", "#59636e", "#d8dee4"
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


def add_title(axes: Axes, title: str, subtitle: str, points: int = 8) -> None:
    """Add a title and a subtitle above the axes, aligned with their left end, `points` above them."""
    looks: tuple[tuple[str, dict[str, Any]], ...] = (
        (subtitle, {"color": QUIET}),
        (title, {"fontsize": 11, "fontweight": "bold"}),
    )
    for place, (text, look) in enumerate(looks):
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
    add_title(axes, f"{measure.words[0].upper()}{measure.words[1:]} by layer", subtitle)
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


def _shown(text: str) -> str:
    """A name from a model as a label: one short line."""
    return shorten(" ".join(text.split()), 56)
