"""Render the page: the template with style, script, pictures and data.

There is one picture of the model, and one of each module that is closed in another picture. They are drawn like the SVG
picture. The script puts pictures of modules that are opened into the others, and colors the adapted layers.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar
from xml.etree.ElementTree import Element, tostring

from hra_fx.reporting.heat import (
    DARK_PALETTE,
    HEATS,
    PALETTE,
    color,
    default_heat,
    heat_of,
    ink_on,
    is_identity,
    scale,
)
from hra_fx.reporting.plain import plain
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap
from hra_fx.view.layout import place
from hra_fx.view.opening import Block, Options, opened
from hra_fx.view.svg import draw, number
from hra_fx.view.svg_file import LINE, entries
from hra_fx.view.theme import as_css, colored
from hra_fx.view.tree import Item, Leaf, Scope, span

_MARGIN = 28.0
STEPS = 64  # colors of a heatmap
#: The files of the style; later ones have priority.
STYLES = ("controls", "drawing", "panel", "media")
#: The files of the script, in one module. Each file comes before the files that import it.
SCRIPTS = ("data", "elements", "heat", "unfold", "stage", "panel", "search", "main")
_IMPORT_OR_EXPORT = re.compile(r"^(?:import .*;\n|export )", re.MULTILINE)
#: What the script gets of a leaf, with these names.
_LEAF_FIELDS = ("kind", "detail", "op", "target", "dtype", "marks", "rank", "parameters")
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class _Space(Heatmap):
    """Reserves the space for the values of heatmaps, which the script writes and colors."""

    is_live: ClassVar[bool] = True

    def strip(self, item: Item) -> tuple[str, str]:
        """A text as long as the longest of all measures; empty in a module."""
        words = "mean " * (len(item.marks) > 1) + "0.000000%"
        return words * isinstance(item, Leaf), ""

    def color(self, value: float) -> str:
        """The color of cells before the script colors them."""
        return "violet-line"

    def line(self, path: str) -> str:
        """Return an empty tooltip."""
        return ""


def pictures(drawing: Drawing, tree: Scope, options: Options) -> str:
    """The pictures as SVG elements. `data-index` is the number of a box in the data."""
    index = {id(item): number for number, item in enumerate(walk(tree))}
    space = _Space(values=heat_of(drawing.rows, "rotation"))  # any measure: only the layers matter
    found: list[str] = []
    blocks = [opened(tree, options.depth, options.focus or "")]
    for block in blocks:
        is_model = block.item is tree
        box = place(block, space, root=is_model)
        wide, high = box.size.width + 2 * _MARGIN, box.size.height + 2 * _MARGIN
        root = _svg(wide, high)
        draw(root, box, _MARGIN, _MARGIN, root=is_model, index=index)
        for name, places in (("enter", box.size.enter), ("leave", [box.size.leave])):  # from the left side
            root[0].set(f"data-{name}", " ".join(number(box.size.width / 2 + x) for x in places))
        found.append(_text(root))
        blocks += (opened(scope, None) for scope in _closed(block))
    return "\n".join(found)


def legend(drawing: Drawing, tree: Scope) -> str:
    """The legend of boxes and markers as list items, without the colors of the heatmap."""
    looks = {Block(item, ()).look if isinstance(item, Scope) else Block(item).look for item in walk(tree)}
    found = []
    for entry in entries(looks, Heatmap(), drawing.skipped):
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

    Example:
        >>> import hra_fx, torch
        >>> from hra_fx.view.drawing import drawing_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> render(drawing_of(model), Options())[:15]
        '<!doctype html>'
    """
    tree = drawing.tree()
    words = {
        "theme": f' data-theme="{options.theme}"' if options.theme else "",
        "title": html.escape(drawing.title),
        "style": "\n".join(["", as_css(), *(_file(f"style/{name}.css") for name in STYLES)]),
        "legend": legend(drawing, tree),
        "pictures": pictures(drawing, tree, options),
        "data": as_json(page_data(drawing, tree, options)),
        "script": "\n" + "\n".join(_IMPORT_OR_EXPORT.sub("", _file(f"script/{name}.js")) for name in SCRIPTS),
    }
    return _SLOT.sub(lambda slot: words[slot[1]], _file("page.html"))


def as_json(data: Any) -> str:
    """Convert data to JSON that cannot be interpreted as markup: ASCII, without `<`.

    >>> as_json({"name": "</script>"})
    '{"name":"\\\\u003c/script>"}'
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def page_data(drawing: Drawing, tree: Scope, options: Options) -> Any:
    """The data for `script/data.js`: the report, and all boxes, each before the boxes inside it."""
    items = _items(tree)
    box = {path: index for index, item in reversed([*enumerate(items)]) for path in item["paths"]}
    data = {
        "title": drawing.title,
        "facts": drawing.facts,
        "items": items,
        "rows": drawing.rows,
        "heats": _heats(drawing),
        "heat": options.heat or ("" if is_identity(drawing.rows) else default_heat(drawing.rows)),
        "colors": [_fill_and_ink(step / STEPS) for step in range(STEPS + 1)] + [_fill_and_ink(math.nan)],
        "skipped": [
            {"path": own.path, "reason": own.reason, "refused": own.targeted, "item": _box(own.path, box)}
            for own in drawing.skipped
        ],
        "full": [{"path": path, "item": _box(path, box)} for path in drawing.trained_in_full],
    }
    return plain(data)


def walk(item: Item) -> Iterator[Item]:
    """A box and all boxes inside it, in the order of their numbers."""
    yield item
    for part in item.items if isinstance(item, Scope) else ():
        yield from walk(part)


def _items(tree: Scope) -> list[dict[str, Any]]:
    """The boxes of a tree, each with the number of its scope."""
    items = [*walk(tree)]
    index = {id(item): number for number, item in enumerate(items)}
    around = {id(part): index[id(item)] for item in items if isinstance(item, Scope) for part in item.items}
    found = []
    for item in items:
        fields: dict[str, Any] = {"parent": around.get(id(item), 0), "label": span(item)}
        fields |= {"paths": item.paths, "count": item.count, "shape": item.shape}
        if isinstance(item, Scope):
            kind = "untraced" if item.eager else "traced"
            fields |= {"kind": kind, "detail": item.class_name, "target": item.path, "ports": item.ports}
        else:
            fields |= {name: getattr(item, name) for name in _LEAF_FIELDS}
        found.append(fields)
    return found


def _fill_and_ink(share: float) -> list[str]:
    """The color of a value between the ends of a heatmap, and of text on it, for light and dark pages."""
    fills = [color(share, (0, 1), palette) for palette in (PALETTE, DARK_PALETTE)]
    return [f"light-dark({', '.join(pair)})" for pair in (fills, map(ink_on, fills))]


def _heats(drawing: Drawing) -> dict[str, Any]:
    """The value of every adapted layer, for each heatmap."""
    heats: dict[str, Any] = {}
    for name, heat in HEATS.items() if drawing.rows else ():
        values = heat_of(drawing.rows, name)
        ends = scale(values.values())
        heats[name] = {"words": heat.words, "unit": heat.unit, "ends": ends, "values": list(values.items())}
    return heats


def _box(path: str, box: Mapping[str, int]) -> int:
    """The box that represents a module, or else the innermost box that contains it."""
    while path and path not in box:
        path = path.rpartition(".")[0]
    return box.get(path, 0)
