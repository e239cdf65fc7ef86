"""The pictures of a page: one of the model, and one of each module that is closed in another picture.

They are drawn as the SVG picture. The script shows one at a time, and colors its adapted layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from xml.etree.ElementTree import Element, tostring

from hra_fx.reporting.heat import HEATS
from hra_fx.view.boxes import place
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Cells, Heatmap, heatmap_of
from hra_fx.view.html.data import walk
from hra_fx.view.legend import LINE, entries
from hra_fx.view.opening import Block, opened
from hra_fx.view.options import Options
from hra_fx.view.svg import draw, number
from hra_fx.view.theme import colored
from hra_fx.view.tree import Item, Leaf, Scope

_MARGIN = 28.0


@dataclass(frozen=True)
class _Space(Heatmap):
    """The space for the values of each heatmap, which the script writes and colors."""

    is_live: ClassVar[bool] = True
    heatmaps: tuple[Heatmap, ...] = ()

    def strip(self, item: Item) -> tuple[str, str]:
        """The longest text; none in a module."""
        texts = (heatmap.strip(item)[0] for heatmap in self.heatmaps) if isinstance(item, Leaf) else ()
        return max(texts, key=len, default=""), ""

    def cells(self, item: Item, width: float) -> Cells:
        """Cells without colors and tips."""
        cells = super().cells(item, width)
        return Cells(("violet-line",) * len(cells.colors), ("",) * len(cells.colors), cells.columns)


def pictures(drawing: Drawing, tree: Scope, options: Options) -> str:
    """The pictures as SVG elements. `data-index` is the number of a box in `data.items_of`.

    Args:
        drawing: the drawing of a model.
        tree: its tree.
        options: what is open in the picture of the model.
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
    """The looks of boxes and markers as items of a list, without the colors of the heatmap."""
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
