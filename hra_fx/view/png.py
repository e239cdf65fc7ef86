"""The picture as pixels, by resvg (https://github.com/linebender/resvg), which needs no browser.

resvg leaves out text for which it has no font, without a word. So DejaVu Sans is looked for where the system has no
fonts, and without any font the picture is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hra_fx.errors import VisualizeError
from hra_fx.view.drawing import Drawing
from hra_fx.view.options import Options
from hra_fx.view.page import render as render_svg

SCALE = 2
#: Pixels on a side that viewers and browsers can be relied on to show.
SIDE = 16_384
_FAMILY = "DejaVu Sans"
_LETTER = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><text y="15">{}</text></svg>'


def render(drawing: Drawing, options: Options) -> bytes:
    """A PNG file with two pixels for each unit of the SVG picture, or one where two would be too many.

    Raises:
        VisualizeError: the options do not fit the model, the picture is too large, or there is no font.
    """
    svg = render_svg(drawing, options)
    root = ElementTree.fromstring(svg)
    side = max(int(root.get("width", "0")), int(root.get("height", "0")))
    if side > SIDE:
        raise VisualizeError(
            f"path: the picture would be {side:,} pixels on a side, and a .png of more than {SIDE:,} opens hardly "
            "anywhere. Give a smaller depth or a module as focus, or write an .svg."
        )
    return rasterize(svg, scale=SCALE if side * SCALE <= SIDE else 1)


def rasterize(svg: str, *, scale: int = SCALE, system_fonts: bool = True, files: Sequence[Path] | None = None) -> bytes:
    """An SVG text as PNG.

    Args:
        svg: the text.
        scale: pixels for each of its units.
        system_fonts: whether the fonts of the machine are used.
        files: further fonts; `None` for those that are found among the installed packages.

    Raises:
        VisualizeError: there is no font.
    """
    from resvg_py import svg_to_bytes

    # Widths of text are reckoned for DejaVu Sans, so that comes first where it is found.
    fonts: dict[str, Any] = {
        "skip_system_fonts": not system_fonts,
        "font_files": [str(file) for file in (brought_along() if files is None else files)],
        "sans_serif_family": _FAMILY,
        "font_family": _FAMILY,
    }
    if svg_to_bytes(svg_string=_LETTER.format("x"), **fonts) == svg_to_bytes(svg_string=_LETTER.format(""), **fonts):
        raise VisualizeError(
            "path: a .png needs a font, and none was found, so it would have no text. Install one (on Debian the "
            "package fonts-dejavu-core) or matplotlib, which brings one; or write an .svg, whose reader has fonts."
        )
    return bytes(svg_to_bytes(svg_string=svg, zoom=scale, **fonts))


def brought_along() -> list[Path]:
    """The fonts in matplotlib, which is looked at and not imported."""
    found = find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    return [folder / name for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf") if (folder / name).is_file()]
