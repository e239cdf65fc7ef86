"""Place boxes: compute the text, the size and the position of every box."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hra_fx.reporting.heat import shorten
from hra_fx.view.heatmap import NO_CELLS, Cells, Heatmap
from hra_fx.view.layout import PER_ROW, Route, Size, layered, rows_of
from hra_fx.view.opening import Block
from hra_fx.view.theme import width
from hra_fx.view.tree import Item, Leaf, Scope, notes, span

NAME, DETAIL = 12.5, 11.0  # font sizes
STRIP = 19.0  # height of the adapter strip on top of its layer
HEADER = 27.0  # height of an open scope's title
#: The looks of single boxes with the detail below the name; in other boxes, it is next to the name.
STACKED = ("adapted_layer", "closed")
_PAD = 14.0
_LETTERS, _PORT = 34, 48
_LINES = 20  # of notes in a tooltip


@dataclass(frozen=True)
class Box:
    """A placed block. `x` and `y` are the position of its upper left corner in its parent."""

    block: Block
    size: Size
    name: str
    detail: str
    count: str  # "× 6" for six modules
    tip: str  # the tooltip; empty for the page, which writes its own tooltips
    strip: str = ""  # the text of the adapter
    heat: str = ""  # the color of the strip, if a heatmap is shown
    cells: Cells = NO_CELLS
    x: float = 0.0
    y: float = 0.0
    parts: tuple[Box, ...] = ()
    routes: tuple[Route, ...] = ()
    body: tuple[float, float] = (0.0, 0.0)  # the position of the inside


def place(block: Block, heatmap: Heatmap, *, root: bool = False) -> Box:
    """Compute the size of a block, and place everything inside it. The root does not have a border or a title."""
    item = block.item
    name = shorten(span(item), _PORT if block.look == "port" else _LETTERS)
    detail = shorten(item.detail if isinstance(item, Leaf) else item.class_name, _LETTERS)
    count = f"× {item.count}" if item.count > 1 else ""
    tip = "" if heatmap.is_live else _tip(item, heatmap)
    box = Box(block, Size(0, 0), name, "" if detail == name else detail, count, tip)
    return _single(box, heatmap) if block.parts is None else _open(box, block.parts, heatmap, root=root)


def _tip(item: Item, heatmap: Heatmap) -> str:
    """The tooltip: all adapted layers, and why other layers have no adapter."""
    if isinstance(item, Leaf):
        lines = [f"{item.target}: {item.detail or item.op}", *filter(None, [item.shape])]
    else:
        lines = [f"{item.path or item.name}: {item.class_name}"]
    more = notes(item)
    cut = [f"… and {len(more) - _LINES} more"] if len(more) > _LINES else []
    return "\n".join([*lines, *map(heatmap.line, item.marks), *more[:_LINES], *cut])


def _single(box: Box, heatmap: Heatmap) -> Box:
    item, look = box.block.item, box.block.look
    if look not in STACKED:
        wide = width(box.name, NAME) + (7 + width(box.detail, DETAIL) if box.detail else 0) + count_width(box.count)
        least, high = (60, 24) if look == "port" else (70, 29)
        return replace(box, size=Size(max(wide + 2 * _PAD, least), high))
    words, heat = heatmap.strip(item)
    strip, value, detail = "", "", box.detail
    if isinstance(item, Scope):
        detail += f" · {len(item.marks)} adapted" * bool(item.marks) + f" · {words}" * bool(words)
        detail += f" · {len(item.skipped)} not adapted" * bool(item.skipped)
    elif not item.marks:
        strip = "same layer, called again"
    elif item.op == "eager":
        strip = f"r {item.rank} · d {item.width} · not traced"
    elif item.rank:
        strip, value = f"r {item.rank} · d {item.width}", f" · {words}" * bool(words)
    else:
        strip, heat = "no active adapter", ""  # nothing is rotated
    name = width(box.name, NAME, bold=True) + count_width(box.count)
    wide = max(name, width(detail, DETAIL), width(strip + value, DETAIL, bold=True) + 12)
    cells = heatmap.cells(item, wide) if look == "closed" or len(item.marks) > 1 else NO_CELLS
    size = Size(wide + 2 * _PAD, (STRIP if strip else 8) + 39 + cells.height)
    heat, strip = heat if strip else "", strip + value * (not heatmap.is_live)
    return replace(box, size=size, detail=detail, strip=strip, heat=heat, cells=cells)


def _open(box: Box, blocks: tuple[Block, ...], heatmap: Heatmap, *, root: bool) -> Box:
    scope = box.block.item
    assert isinstance(scope, Scope)  # only scopes have parts
    parts = [place(block, heatmap) for block in blocks]
    sizes = [part.size for part in parts]
    inner = layered(sizes, scope.edges, scope.inputs, scope.outputs, scope_rows(scope))
    left, top, wide, high = 0.0, 0.0, inner.width, inner.height
    if not root:
        title = width(box.name, NAME, bold=True) + 8 + width(box.detail, DETAIL) + count_width(box.count)
        wide = max(title, inner.width) + 2 * _PAD
        left, top = (wide - inner.width) / 2, HEADER + (0 if scope.inputs else 12)
        high = top + inner.height + (0 if scope.outputs else 12)
    return replace(
        box,
        size=Size(wide, high, left + inner.enter - wide / 2, left + inner.leave - wide / 2),
        parts=tuple(replace(part, x=x, y=y) for part, (x, y) in zip(parts, inner.corners, strict=True)),
        routes=inner.routes,
        body=(left, top),
    )


def scope_rows(scope: Scope) -> list[int]:
    """The row of every item. In a traced scope, edges determine it; otherwise modules are below each other in order."""
    if not scope.eager:
        return rows_of(len(scope.items), scope.edges, scope.inputs)
    rows = [0]
    for index in range(1, len(scope.items)):
        alone = any(isinstance(item, Scope) for item in scope.items[index - 1 : index + 1])
        rows.append(rows[-1] + (alone or rows.count(rows[-1]) >= PER_ROW))
    return rows


def count_width(count: str) -> float:
    """The width that the number of modules takes in a box."""
    return width(count, DETAIL, bold=True) + 22 if count else 0.0
