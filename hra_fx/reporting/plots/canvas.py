"""A figure of matplotlib without its global state, and its file, which is the same for the same numbers."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hra_fx.atomic_write import output_file, put_whole
from hra_fx.errors import VisualizeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
INK, QUIET, GRID = "#1f2328", "#59636e", "#d8dee4"
# What matplotlib would write of the moment and of itself.
_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "hra_fx",
    # Text as text, which can be searched and read aloud.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    # The one font that comes with matplotlib, so that every machine draws the same.
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "font.size": 9.0,
    # Names from a model are no formulas.
    "text.parse_math": False,
}


def check_plot(path: str | os.PathLike[str]) -> Path:
    """The path of a plot that can be written, asked for before the work of it.

    Raises:
        VisualizeError: another ending, no such folder, or matplotlib is not installed.
    """
    file = output_file(path, FORMATS)
    require_matplotlib()
    return file


def require_matplotlib() -> None:
    """Refuse to plot without matplotlib.

    Raises:
        VisualizeError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise VisualizeError(
            "plots are drawn by matplotlib, which is not installed. Call pip install 'hra-fx[plot]'. Without it "
            "print(hra_fx.report(model)), its to_markdown() and to_json() have the same numbers, and hra_fx.visualize "
            "draws them into the model."
        ) from error


def style() -> Any:
    """The context in which figures are made and written."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)  # type: ignore[arg-type]


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def entitle(axes: Axes, title: str, subtitle: str = "", points: int = 8) -> None:
    """A heading so many points above the axes, and a line below it, both from the left end of what is drawn."""
    lines: list[tuple[str, dict[str, Any]]] = [(title, {"fontsize": 11, "fontweight": "bold"})]
    if subtitle:
        lines.append((subtitle, {"color": QUIET}))
    for place, (text, look) in enumerate(reversed(lines)):
        shift = (0, points + 16 * place)
        axes.annotate(text, (0, 1), shift, xycoords="axes fraction", textcoords="offset points", **look)


def inches(text: str, size: float) -> float:
    """Upper estimate of the width of a text of so many points."""
    return 0.58 * size / 72 * len(text)


def write(figure: Figure, file: Path) -> Path:
    """Write a figure, cut to what is on it: the whole file or nothing.

    Raises:
        VisualizeError: the disk refused.
    """
    ending, buffer = file.suffix.lower(), io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is a box in the picture, and an SVG leaves it to the reader's fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(
            buffer, format=ending[1:], dpi=160, bbox_inches="tight", pad_inches=0.15, metadata=_METADATA[ending]
        )
    put_whole(file, buffer.getvalue())
    return file


def shown(text: str, letters: int = 60) -> str:
    """A name from a model as a label: on one line, printable, and not endless.

    >>> shown("a\\nb"), shown("x" * 99, 9)
    ('a b', 'xxxx…xxxx')
    """
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    if len(line) <= letters:
        return line
    tail = (letters - 1) // 2
    return f"{line[: letters - 1 - tail]}…{line[len(line) - tail :]}"
