"""Render the page: the template with style, script, pictures, data and a strict content security policy.

There is one picture of the model, and one of each module that is closed in another picture. They are drawn like the SVG
picture. The script shows one picture at a time and colors its adapted layers.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, ClassVar
from xml.etree.ElementTree import Element, tostring

from hra_fx.reporting.heat import HEATS
from hra_fx.view.boxes import place
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.html.data import page_data, walk
from hra_fx.view.opening import Block, Options, opened
from hra_fx.view.page import LINE, entries
from hra_fx.view.svg import draw, number
from hra_fx.view.theme import as_css, clean, colored
from hra_fx.view.tree import Item, Leaf, Scope

_MARGIN = 28.0
#: The files of the style; later ones have priority.
STYLES = ("colors", "controls", "drawing", "panel", "media")
#: The files of the script. Each file comes before the files that import it.
SCRIPTS = ("data", "elements", "heat", "stage", "spectrum", "panel", "search", "keyboard", "main")
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:class|const|function) (\w+))", re.MULTILINE)
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class _Space(Heatmap):
    """Reserves the space for the values of heatmaps, which the script writes and colors."""

    is_live: ClassVar[bool] = True
    heatmaps: tuple[Heatmap, ...] = ()

    def strip(self, item: Item) -> tuple[str, str]:
        """The longest text; empty in a module."""
        texts = (heatmap.strip(item)[0] for heatmap in self.heatmaps) if isinstance(item, Leaf) else ()
        return max(texts, key=len, default=""), ""

    def color(self, value: float) -> str:
        """The color of cells before the script colors them."""
        return "violet-line"

    def line(self, path: str) -> str:
        """Return an empty tooltip."""
        return ""


def pictures(drawing: Drawing, tree: Scope, options: Options) -> str:
    """The pictures as SVG elements. `data-index` is the number of a box in `data.items_of`.

    Args:
        drawing: the drawing of a model.
        tree: the tree of the drawing.
        options: the modules that are open in the picture of the model.
    """
    index = {id(item): number for number, item in enumerate(walk(tree))}
    heatmaps = tuple(heatmap_of(drawing, name) for name in HEATS) if drawing.rows else ()
    space = _Space(heatmaps[0].name, heatmaps[0].values, heatmaps=heatmaps) if heatmaps else Heatmap()
    found: list[str] = []
    blocks = [opened(tree, options.depth, options.focus or "")]
    for block in blocks:
        is_model = block.item is tree
        box = place(block, space, root=is_model)
        wide, high = box.size.width + 2 * _MARGIN, box.size.height + 2 * _MARGIN
        root = _svg(wide, high)
        draw(root, box, _MARGIN, _MARGIN, root=is_model, index=index)
        found.append(_text(root))
        blocks += (opened(scope, None) for scope in _closed(block))
    return "\n".join(found)


def legend(drawing: Drawing, tree: Scope) -> str:
    """The legend of boxes and markers as list items, without the colors of the heatmap."""
    looks = {Block(item, ()).look if isinstance(item, Scope) else Block(item).look for item in walk(tree)}
    found = []
    for entry in entries(looks, Heatmap(), len(drawing.skipped), len(drawing.refused)):
        root = _svg(entry.width, LINE)
        entry.draw(root, 0.5, 3.5)
        found.append(f"<li>{_text(root)}</li>")
    return "".join(found)


def _closed(block: Block) -> Iterator[Scope]:
    """The closed modules in a picture."""
    if block.parts is None and isinstance(block.item, Scope):
        yield block.item
    for part in block.parts or ():
        yield from _closed(part)


def _svg(wide: float, high: float) -> Element:
    return Element(
        "svg", {"viewBox": f"0 0 {number(wide)} {number(high)}", "width": number(wide), "height": number(high)}
    )


def _text(root: Element) -> str:
    colored(root, None)
    return tostring(root, encoding="unicode")


def render(drawing: Drawing, options: Options) -> str:
    """Render the page of a drawing: one self-contained HTML file.

    Args:
        drawing: the drawing of a model.
        options: the levels that are open first, the module that is the root, and the heatmap that is shown first.

    Example:
        >>> import hra_fx, torch
        >>> from hra_fx.view.drawing import drawing_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> render(drawing_of(model), Options())[:15]
        '<!doctype html>'
    """
    style, script, tree = _style(), _script(), drawing.tree()
    words = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "theme": f' data-theme="{options.theme}"' if options.theme else "",
        "title": html.escape(clean(drawing.title)),
        "style": style,
        "legend": legend(drawing, tree),
        "pictures": pictures(drawing, tree, options),
        "data": as_json(page_data(drawing, tree, options)),
        "script": script,
    }
    return _SLOT.sub(lambda slot: words[slot[1]], _file("page.html"))


def as_json(data: Any) -> str:
    """Convert data to JSON that cannot be interpreted as markup: ASCII, without `<`.

    >>> as_json({"name": "</script>"})
    '{"name":"\\\\u003c/script>"}'
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    """The source expression that only allows this text in the page (https://www.w3.org/TR/CSP3/)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    return "\n".join(["", as_css(), *(_file(f"style/{name}.css") for name in STYLES)])


@cache
def _script() -> str:
    """The modules of the script as one text. Each module is a function with its own names that returns its exports."""
    return "\n" + "\n".join(_as_function(name, _file(f"script/{name}.js")) for name in SCRIPTS)


def _as_function(name: str, text: str) -> str:
    exports = ", ".join(_EXPORT.findall(text))
    body = _EXPORT.sub("", _IMPORT.sub(r"const \1 = $\2;", text))
    return f"const ${name} = (() => {{\n{body}return {{ {exports} }};\n}})();\n"
