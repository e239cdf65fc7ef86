"""The formats of pictures by file ending. What a format needs is imported when it is written."""

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
from hra_fx.view.options import Options

Render: TypeAlias = Callable[[Drawing, Options], "str | bytes"]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        words: what it is for.
        module: the file whose `render` writes it.
        library: a package that has to be installed for it, `""` for none.
        extra: the extra of this package that installs it.
    """

    words: str
    module: str
    library: str = ""
    extra: str = ""

    @property
    def works(self) -> bool:
        """Whether all that it needs is installed."""
        return not self.library or find_spec(self.library) is not None


FORMATS: Mapping[str, Format] = {
    ".svg": Format("a picture that fits a page", "hra_fx.view.page"),
    ".png": Format("the same as pixels", "hra_fx.view.png", "resvg_py", "png"),
    ".html": Format("a page to explore", "hra_fx.view.html.rendering"),
    ".mmd": Format("Mermaid, for READMEs", "hra_fx.view.mermaid"),
    ".dot": Format("Graphviz", "hra_fx.view.dot"),
    ".graphml": Format("networkx, Gephi, yEd", "hra_fx.view.graphml"),
    ".json": Format("Model Explorer", "hra_fx.view.model_explorer"),
}


def picture_file(path: str | os.PathLike[str], formats: Mapping[str, Format] = FORMATS) -> Path:
    """The path of a picture that can be written.

    Args:
        path: as the user gave it.
        formats: those to choose from.

    Raises:
        VisualizeError: as `output_file`, or the format's library is not installed; the message lists what works.
    """
    working = ", ".join(f"{ending} ({form.words})" for ending, form in formats.items() if form.works)
    file = output_file(path, formats, listed=working)
    form = formats[file.suffix.lower()]
    if not form.works:
        raise VisualizeError(
            f"path: {file.name!r} needs the package {form.library.replace('_', '-')}, which is not installed: "
            f"pip install 'hra-fx[{form.extra}]'. The formats that can be written without it are {working}."
        )
    return file


def renderer(file: Path) -> Render:
    """What writes a file that `picture_file` let through."""
    render: Render = import_module(FORMATS[file.suffix.lower()].module).render
    return render
