"""Matplotlib figures without its global state, and their files, which are the same for the same values."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hra_fx.atomic_write import output_file, write_output_file
from hra_fx.errors import VisualizeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
INK, QUIET, GRID = "#1f2328", "#59636e", "#d8dee4"
# Leave out the date and the version of matplotlib.
_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "hra_fx",
    # Text as text, so that it can be searched and read aloud.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    # The font that comes with matplotlib, so that every machine draws the same.
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "font.size": 9.0,
    # Names from a model are not formulas.
    "text.parse_math": False,
}


def check_plot(path: str | os.PathLike[str]) -> Path:
    """Check the path of a plot before the work starts, and return it.

    Raises:
        VisualizeError: unknown file ending, no such folder, or matplotlib is not installed.
    """
    file = output_file(path, FORMATS)
    require_matplotlib()
    return file


def require_matplotlib() -> None:
    """Raise an error if matplotlib is not installed.

    Raises:
        VisualizeError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise VisualizeError(
            "Plots need matplotlib, which is not installed. Run: pip install 'hra-fx[plot]'. Without it, "
            "print(hra_fx.report(model)) or its to_json() give the same values, and hra_fx.visualize draws them."
        ) from error


def style() -> Any:
    """The rc context in which figures are made and written."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)  # type: ignore[arg-type]


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def entitle(axes: Axes, title: str, subtitle: str = "", points: int = 8) -> None:
    """A heading some points above the axes, and a line below it, both aligned with the left end of the axes."""
    lines: list[tuple[str, dict[str, Any]]] = [(title, {"fontsize": 11, "fontweight": "bold"})]
    if subtitle:
        lines.append((subtitle, {"color": QUIET}))
    for place, (text, look) in enumerate(reversed(lines)):
        shift = (0, points + 16 * place)
        axes.annotate(text, (0, 1), shift, xycoords="axes fraction", textcoords="offset points", **look)


def inches(text: str, size: float) -> float:
    """Upper estimate of the width of a text in inches; `size` in points."""
    return 0.58 * size / 72 * len(text)


def write(figure: Figure, file: Path) -> Path:
    """Write a figure, cropped to its content, as a whole file or not at all.

    Raises:
        VisualizeError: the file could not be written.
    """
    ending, buffer = file.suffix.lower(), io.BytesIO()
    with warnings.catch_warnings():
        # A missing glyph is drawn as a box, and in an SVG the reader's fonts draw it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(
            buffer, format=ending[1:], dpi=160, bbox_inches="tight", pad_inches=0.15, metadata=_METADATA[ending]
        )
    write_output_file(file, buffer.getvalue())
    return file


def shown(text: str, letters: int = 60) -> str:
    """A name from a model as a label: one line, printable, shortened.

    >>> shown("a\\nb"), shown("x" * 99, 9)
    ('a b', 'xxxx…xxxx')
    """
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    if len(line) <= letters:
        return line
    tail = (letters - 1) // 2
    return f"{line[: letters - 1 - tail]}…{line[len(line) - tail :]}"


def short_number(value: float) -> str:
    """A value in about three characters, to fit into a cell.

    >>> [short_number(value) for value in (0.0, 0.004, 0.25, 7.31, 123.4)]
    ['0', '.004', '.25', '7.3', '123']
    """
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    if value < 0.0005:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.2g}".removeprefix("0")
