"""Placed boxes: the text of every box, its size and its position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from hra_fx.view.heatmap import NO_CELLS, Cells, Heatmap
from hra_fx.view.layout import Arrangement, Route, Size, in_rows, layered
from hra_fx.view.opening import Block
from hra_fx.view.text import clean, shorten, width
from hra_fx.view.tree import Leaf, Scope, notes, span

NAME, DETAIL = 12.5, 11.0  # font sizes
STRIP = 19.0  # height of the adapter strip on top of its layer
HEADER = 27.0  # height of an open scope's title
_PAD = 14.0
_ROW = 1020.0  # maximum width of a row in a scope without edges
_LETTERS, _PORT = 34, 48
_LINES = 20  # of a tooltip

Look: TypeAlias = Literal["port", "adapted_layer", "plain", "eager", "trained", "closed", "traced", "untraced", "root"]
_OPEN = ("traced", "untraced", "root")


@dataclass(frozen=True)
class Box:
    """A placed block. `x` and `y` are the position of its upper left corner in its parent.

    Attributes:
        look: how it is drawn.
        size: its size and ports.
        name, detail, strip: its texts; `strip` is the text of the adapter.
        tip: its tooltip.
        adapted: number of adapted layers that it stands for.
        count: `"× 6"`, if it stands for several modules.
        heat: the color of the adapter strip, if a heatmap is shown.
        cells: one cell for each adapted layer, if there are several.
        skipped: number of layers in it without an adapter.
        refused: whether one of them should have an adapter.
        parts: boxes inside.
        routes: edges between them.
        body: position of the inside.
    """

    look: Look
    size: Size
    name: str
    detail: str
    tip: str
    adapted: int
    strip: str = ""
    count: str = ""
    heat: str = ""
    cells: Cells = NO_CELLS
    skipped: int = 0
    refused: bool = False
    x: float = 0.0
    y: float = 0.0
    parts: tuple[Box, ...] = ()
    routes: tuple[Route, ...] = ()
    body: tuple[float, float] = (0.0, 0.0)

    def leaves(self) -> Iterator[Box]:
        """The boxes without parts."""
        if self.look in _OPEN:
            for part in self.parts:
                yield from part.leaves()
        else:
            yield self


def place(block: Block, heatmap: Heatmap, *, root: bool = False) -> Box:
    """Compute the size of a block, and place everything inside it.

    Args:
        block: the block.
        heatmap: the colors of adapted layers.
        root: whether it is the whole picture, which has no border and no title.
    """
    if isinstance(block.item, Leaf):
        return _adapted(block.item, heatmap) if block.item.kind == "adapted_layer" else _leaf(block.item, heatmap)
    if block.parts is None:
        return _closed(block.item, heatmap)
    return _open(block.item, block.parts, heatmap, root=root)


def _adapted(leaf: Leaf, heatmap: Heatmap) -> Box:
    name, detail, count = shorten(clean(span(leaf)), _LETTERS), clean(leaf.detail), _count(leaf)
    words, heat = heatmap.strip(leaf) if leaf.rank else ("", "")  # without an active adapter nothing is rotated
    strip = _strip(leaf, words)
    wide = max(
        width(name, NAME, bold=True) + count_width(count), width(detail, DETAIL), width(strip, DETAIL, bold=True) + 12
    )
    cells = heatmap.cells(leaf, wide) if len(leaf.marks) > 1 else NO_CELLS
    tip = clean_lines([f"{leaf.target}: {detail}", strip], list(map(heatmap.line, leaf.marks)))
    size = Size(wide + 2 * _PAD, STRIP + 39 + cells.height)
    return Box("adapted_layer", size, name, detail, tip, len(leaf.marks), strip, count=count, heat=heat, cells=cells)


def _strip(leaf: Leaf, words: str) -> str:
    """The text of an adapter: number and length of its vectors, and how far they rotate."""
    if not leaf.marks:
        return "same layer, called again"
    if leaf.op == "eager":
        return f"r {leaf.rank} · d {leaf.width} · not traced"
    strip = f"r {leaf.rank} · d {leaf.width}" if leaf.rank else "no active adapter"
    return f"{strip} · {words}" if words else strip


def _leaf(leaf: Leaf, heatmap: Heatmap) -> Box:
    letters = _PORT if leaf.kind in ("input", "output") else _LETTERS
    name, detail, count = shorten(clean(span(leaf)), letters), shorten(clean(leaf.detail), _LETTERS), _count(leaf)
    detail = "" if detail == name else detail
    wide = width(name, NAME) + (7 + width(detail, DETAIL) if detail else 0) + count_width(count) + 2 * _PAD
    tip = clean_lines([f"{leaf.target} ({leaf.op})", leaf.detail, leaf.shape, *notes(leaf)])
    if leaf.kind in ("input", "output"):
        return Box("port", Size(max(wide, 60), 24), name, detail, tip, 0)
    look: Look = "trained" if leaf.trained else "eager" if leaf.kind == "eager" else "plain"
    return Box(
        look,
        Size(max(wide, 70), 29),
        name,
        detail,
        tip,
        0,
        count=count,
        skipped=len(leaf.skipped),
        refused=bool(leaf.refused),
    )


def _closed(scope: Scope, heatmap: Heatmap) -> Box:
    name, count = shorten(clean(span(scope)), _LETTERS), _count(scope)
    detail = shorten(clean(scope.class_name), _LETTERS)
    adapted, skipped = len(scope.marks), scope.skipped
    words, _ = heatmap.strip(scope)
    detail += f" · {adapted} adapted" * bool(adapted) + f" · {words}" * bool(words)
    detail += f" · {len(skipped)} not adapted" * bool(skipped)
    wide = max(width(name, NAME, bold=True) + count_width(count), width(detail, DETAIL))
    tip = clean_lines(
        [f"{scope.path or scope.name}: {scope.class_name}"],
        list(map(heatmap.line, scope.marks)),
        notes(scope),
    )
    cells = heatmap.cells(scope, wide)
    size = Size(wide + 2 * _PAD, 47 + cells.height)
    box = Box("closed", size, name, detail, tip, adapted, count=count, cells=cells)
    return replace(box, skipped=len(skipped), refused=bool(scope.refused))


def _open(scope: Scope, blocks: tuple[Block, ...], heatmap: Heatmap, *, root: bool) -> Box:
    parts = [place(block, heatmap) for block in blocks]
    sizes = [part.size for part in parts]
    inner = in_rows(sizes, _ROW) if scope.eager else layered(sizes, scope.edges, scope.inputs, scope.outputs)
    name, detail = shorten(clean(span(scope)), _LETTERS), shorten(clean(scope.class_name), _LETTERS)
    count = _count(scope)
    title = width(name, NAME, bold=True) + 8 + width(detail, DETAIL) + count_width(count) + 2 * _PAD
    if root:
        left, top, wide, high = 0.0, 0.0, inner.width, inner.height
    else:
        wide = max(title, inner.width + 2 * _PAD)
        left, top = (wide - inner.width) / 2, HEADER + (0 if scope.inputs else 12)
        high = top + inner.height + (0 if scope.outputs else 12)
    size = Size(wide, high, left + inner.enter - wide / 2, left + inner.leave - wide / 2)
    return Box(
        "root" if root else "untraced" if scope.eager else "traced",
        size,
        name,
        detail,
        clean_lines([f"{scope.path or scope.name}: {scope.class_name}"]),
        len(scope.marks),
        count=count,
        parts=tuple(_moved(part, inner, index) for index, part in enumerate(parts)),
        routes=inner.routes,
        body=(left, top),
    )


def _moved(part: Box, inner: Arrangement, index: int) -> Box:
    x, y = inner.corners[index]
    return replace(part, x=x, y=y)


def _count(item: Leaf | Scope) -> str:
    return f"× {item.count}" if item.count > 1 else ""


def count_width(count: str) -> float:
    """The width that the number of modules takes in a box."""
    return width(count, DETAIL, bold=True) + 22 if count else 0.0


def clean_lines(lines: list[str], layers: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """Lines of a tooltip, without characters that XML cannot hold. All layers are listed; other long lists are cut.

    Args:
        lines: the first lines.
        layers: a line for each adapted layer.
        more: further lines.
    """
    first, last = [clean(line) for line in lines if line], [clean(line) for line in more]
    shown = [*_cut(first), *map(clean, layers), *_cut(last)]
    return "\n".join(shown)


def _cut(lines: list[str]) -> list[str]:
    return lines[:_LINES] + ([f"… and {len(lines) - _LINES} more"] if len(lines) > _LINES else [])
