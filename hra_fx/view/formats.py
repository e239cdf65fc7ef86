"""The formats of pictures by file ending."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from hra_fx.atomic_write import output_file
from hra_fx.errors import VisualizeError
from hra_fx.view import mermaid, page, png
from hra_fx.view.drawing import Drawing
from hra_fx.view.focus import focused
from hra_fx.view.graph_files import render_dot, render_graphml
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.html import rendering
from hra_fx.view.options import Options


class Format(NamedTuple):
    """A format: what it is, the function that renders a drawing, and whether it can be dark."""

    words: str
    render: Callable[[Drawing, Options], str | bytes]
    themed: bool = False


FORMATS: Mapping[str, Format] = {
    ".svg": Format("picture", page.render, themed=True),
    ".png": Format("picture", png.render, themed=True),
    ".html": Format("interactive page", rendering.render, themed=True),
    ".mmd": Format("Mermaid, for READMEs", mermaid.render),
    ".dot": Format("Graphviz", render_dot),
    ".graphml": Format("networkx, Gephi, yEd", render_graphml),
}


def picture_file(path: str | os.PathLike[str]) -> Path:
    """Check the path of a picture before the work starts, and return it.

    Args:
        path: the path from the user.

    Raises:
        VisualizeError: as `output_file`, or the format's package is not installed; the message lists the other formats.
    """
    has_png = find_spec("resvg_py") is not None
    working = ", ".join(f"{end} ({form.words})" for end, form in FORMATS.items() if has_png or end != ".png")
    file = output_file(path, FORMATS, listed=working)
    if file.suffix.lower() == ".png" and not has_png:
        raise VisualizeError(
            f"{file.name!r} needs the package resvg-py, which is not installed. Run: pip install 'hra-fx[png]'. "
            f"Formats that need no other package: {working}."
        )
    return file


def rendered(file: Path, drawing: Drawing, options: Options) -> bytes:
    """The content of a file which `picture_file` has checked.

    Args:
        file: the path of the picture.
        drawing: the drawing of the whole model.
        options: what of it is drawn.

    Raises:
        VisualizeError: the options do not fit the model.
    """
    form = FORMATS[file.suffix.lower()]
    if options.theme and not form.themed:
        known = ", ".join(ending for ending, other in FORMATS.items() if other.themed)
        raise VisualizeError(f"`theme` is for {known}, and {file.name!r} is not one of them. Leave it out.")
    part = focused(drawing, options.focus)
    heatmap_of(part, options.heat)  # the same error for all formats
    content = form.render(part, options)
    return content if isinstance(content, bytes) else content.encode("utf-8")
