"""The formats of pictures by file ending. A format's module is imported when a file is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from hra_fx.atomic_write import output_file
from hra_fx.errors import VisualizeError
from hra_fx.view.drawing import Drawing
from hra_fx.view.focus import focused
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.options import Options

#: Renders a drawing that is already the one of `options.focus`.
Render: TypeAlias = Callable[[Drawing, Options], "str | bytes"]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        words: what it is, in error messages.
        module: the module with its `render` function.
        library: a package that it requires, `""` for none.
        extra: the extra of hra-fx that installs that package.
        themed: whether it can be dark.
    """

    words: str
    module: str
    library: str = ""
    extra: str = ""
    themed: bool = False

    @property
    def works(self) -> bool:
        """Whether the required package is installed."""
        return not self.library or find_spec(self.library) is not None


FORMATS: Mapping[str, Format] = {
    ".svg": Format("picture", "hra_fx.view.page", themed=True),
    ".png": Format("picture", "hra_fx.view.png", "resvg_py", "png", themed=True),
    ".html": Format("interactive page", "hra_fx.view.html.rendering", themed=True),
    ".mmd": Format("Mermaid, for READMEs", "hra_fx.view.mermaid"),
    ".dot": Format("Graphviz", "hra_fx.view.dot"),
    ".graphml": Format("networkx, Gephi, yEd", "hra_fx.view.graphml"),
}


def picture_file(path: str | os.PathLike[str], formats: Mapping[str, Format] = FORMATS) -> Path:
    """Check the path of a picture before the work starts, and return it.

    Args:
        path: the path from the user.
        formats: the available formats.

    Raises:
        VisualizeError: as `output_file`, or the format's package is not installed; the message lists the other formats.
    """
    working = ", ".join(f"{ending} ({form.words})" for ending, form in formats.items() if form.works)
    file = output_file(path, formats, listed=working)
    form = formats[file.suffix.lower()]
    if not form.works:
        raise VisualizeError(
            f"{file.name!r} needs the package {form.library.replace('_', '-')}, which is not installed. Run: "
            f"pip install 'hra-fx[{form.extra}]'. Formats that need no other package: {working}."
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
    render: Render = import_module(form.module).render
    content = render(part, options)
    return content if isinstance(content, bytes) else content.encode("utf-8")
