"""The picture as PNG, rendered by resvg (https://github.com/linebender/resvg) without a browser.

resvg silently leaves out text if there is no font. Systems without fonts use DejaVu Sans from matplotlib, and without
any font an error is raised.
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
#: Largest width and height in pixels that viewers and browsers reliably show.
SIDE = 16_384
_FAMILY = "DejaVu Sans"
_LETTER = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20"><text y="15">{}</text></svg>'


def render(drawing: Drawing, options: Options) -> bytes:
    """A PNG file with two pixels per unit of the SVG picture, or one if two would be too many.

    Raises:
        VisualizeError: the options do not fit the model, the picture is too large, or there is no font.
    """
    svg = render_svg(drawing, options)
    root = ElementTree.fromstring(svg)
    side = max(int(root.get("width", "0")), int(root.get("height", "0")))
    if side > SIDE:
        raise VisualizeError(
            f"The picture would be {side:,} pixels wide or high, and few programs open a .png of more than {SIDE:,}. "
            "Pass a smaller `depth` or a module as `focus`, or write an .svg."
        )
    return rasterize(svg, scale=SCALE if side * SCALE <= SIDE else 1)


def rasterize(svg: str, *, scale: int = SCALE, system_fonts: bool = True, files: Sequence[Path] | None = None) -> bytes:
    """An SVG text as PNG.

    Args:
        svg: the text.
        scale: pixels per unit.
        system_fonts: whether to use the fonts of the system.
        files: more font files; `None` for those of matplotlib, if it is installed.

    Raises:
        VisualizeError: there is no font.
    """
    from resvg_py import svg_to_bytes

    # Text widths are estimated for DejaVu Sans, so it is preferred.
    fonts: dict[str, Any] = {
        "skip_system_fonts": not system_fonts,
        "font_files": [str(file) for file in (matplotlib_fonts() if files is None else files)],
        "sans_serif_family": _FAMILY,
        "font_family": _FAMILY,
    }
    if svg_to_bytes(svg_string=_LETTER.format("x"), **fonts) == svg_to_bytes(svg_string=_LETTER.format(""), **fonts):
        raise VisualizeError(
            "A .png needs a font, and none was found. Install one (on Debian the package fonts-dejavu-core), or "
            "matplotlib, which includes one; or write an .svg."
        )
    return bytes(svg_to_bytes(svg_string=svg, zoom=scale, **fonts))


def matplotlib_fonts() -> list[Path]:
    """The font files in matplotlib, which is not imported for that."""
    found = find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        return []
    folder = Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    return [folder / name for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf") if (folder / name).is_file()]
