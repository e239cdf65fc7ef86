"""Blocks with sizes and places: what the text of every box says, and how large the box is because of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from hra_fx.view.coordinates import Size
from hra_fx.view.layout import Arrangement, Route, in_rows, layered
from hra_fx.view.annotations import NO_CELLS, Cells, Annotations
from hra_fx.view.panels import Block
from hra_fx.view.text import clean, shorten, width
from hra_fx.view.tree import Leaf, Scope, span

NAME, DETAIL = 12.5, 11.0  # font sizes
STRIP = 19.0  # height of the reflection on top of its layer
HEADER = 27.0  # height of an open scope's title
_PAD = 14.0
_ROW, _ROW_OVERVIEW = 1020.0, 240.0  # widest row of a scope without edges
_LETTERS, _PORT = 34, 48
_LINES = 20  # of a tip

Look: TypeAlias = Literal["port", "adapted_layer", "plain", "eager", "closed", "traced", "untraced", "root"]
_OPEN = ("traced", "untraced", "root")


@dataclass(frozen=True)
class Box:
    """A placed block; `x` and `y` are those of its upper left corner, in its parent.

    Attributes:
        look: how it is drawn.
        size: its size and ports.
        name, detail, strip: its texts; `strip` is the one of the reflection.
        tip: what a reader sees who points at it.
        sites: how many sites it stands for.
        letter: the panel that shows its inside.
        count: `"× 6"`, if it stands for several.
        heat: the color of the reflection, where heat is on.
        cells: the heat of each site, where there are several.
        skipped: how many layers in it could carry reflections, and do not.
        parts: boxes inside.
        routes: edges between them.
        body: where the inside begins.
    """

    look: Look
    size: Size
    name: str
    detail: str
    tip: str
    sites: int
    strip: str = ""
    letter: str = ""
    count: str = ""
    heat: str = ""
    cells: Cells = NO_CELLS
    skipped: int = 0
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


def place(block: Block, notes: Annotations, *, root: bool = False) -> Box:
    """Size a block and place all that is inside it.

    Args:
        block: the block.
        notes: what is shown besides.
        root: whether it is a whole panel, which gets neither border nor title.
    """
    if isinstance(block.item, Leaf):
        return _site(block.item, notes) if block.item.kind == "adapted_layer" else _leaf(block.item, notes)
    if block.parts is None:
        return _closed(block.item, block.letter, notes)
    return _open(block.item, block.parts, notes, root=root)


def _site(leaf: Leaf, notes: Annotations) -> Box:
    name, detail, count = shorten(clean(span(leaf)), _LETTERS), clean(leaf.detail), _count(leaf)
    rotated, heat = notes.strip(leaf)
    strip = _strip(leaf, rotated)
    wide = max(
        width(name, NAME, bold=True) + _count_width(count), width(detail, DETAIL), width(strip, DETAIL, bold=True) + 12
    )
    cells = notes.cells(leaf, wide) if len(leaf.marks) > 1 else NO_CELLS
    tip = clean_lines([f"{leaf.target}: {detail}", strip], [notes.value(mark.path) for mark in leaf.marks])
    size = Size(wide + 2 * _PAD, STRIP + 39 + cells.height)
    return Box("adapted_layer", size, name, detail, tip, len(leaf.marks), strip, count=count, heat=heat, cells=cells)


def _strip(leaf: Leaf, rotated: str) -> str:
    """The words of a reflection: how many vectors, how long, how far they turn."""
    if not leaf.marks:
        return "same layer, called again"
    if leaf.op == "eager":
        return f"r {leaf.rank} · d {leaf.width} · not called"
    strip = f"r {leaf.rank} · d {leaf.width}" if leaf.rank else "no adapter in use"
    rotations = [mark.rotation for mark in leaf.marks if mark.rotation is not None]
    if rotated:
        return f"{strip} · {rotated}"
    return strip + (f" · |Q-I| {sum(rotations) / len(rotations):.2f}" if rotations else "")


def _leaf(leaf: Leaf, notes: Annotations) -> Box:
    letters = _PORT if leaf.kind in ("input", "output") else _LETTERS
    name, detail, count = shorten(clean(span(leaf)), letters), shorten(clean(leaf.detail), _LETTERS), _count(leaf)
    detail = "" if detail == name else detail
    skipped = notes.skipped_in(leaf)
    wide = width(name, NAME) + (7 + width(detail, DETAIL) if detail else 0) + _count_width(count) + 2 * _PAD
    tip = clean_lines([f"{leaf.target} ({leaf.op})", leaf.detail, leaf.shape, *notes.reasons(skipped)])
    if leaf.kind in ("input", "output"):
        return Box("port", Size(max(wide, 60), 24), name, detail, tip, 0)
    look: Look = "eager" if leaf.kind == "eager" else "plain"
    return Box(look, Size(max(wide, 70), 29), name, detail, tip, 0, count=count, skipped=len(skipped))


def _closed(scope: Scope, letter: str, notes: Annotations) -> Box:
    name, count = shorten(clean(span(scope)), _LETTERS), _count(scope)
    detail = shorten(clean(scope.class_name), _LETTERS)
    sites, skipped = len(scope.marks), notes.skipped_in(scope)
    rotated, _ = notes.strip(scope)
    detail += f" · {_number(sites, 'site')}" * bool(sites) + f" · {rotated}" * bool(rotated)
    detail += f" · {len(skipped)} skipped" * bool(skipped)
    wide = max(width(name, NAME, bold=True) + _count_width(count), width(detail, DETAIL)) + (30 if letter else 0)
    tip = clean_lines(
        [f"{scope.path or scope.name}: {scope.class_name}"],
        [notes.value(mark.path) for mark in scope.marks],
        notes.reasons(skipped),
    )
    cells = notes.cells(scope, wide)
    size = Size(wide + 2 * _PAD, 47 + cells.height)
    return Box("closed", size, name, detail, tip, sites, letter=letter, count=count, cells=cells, skipped=len(skipped))


def _open(scope: Scope, blocks: tuple[Block, ...], notes: Annotations, *, root: bool) -> Box:
    parts = [place(block, notes) for block in blocks]
    sizes = [part.size for part in parts]
    if scope.eager:
        inner = in_rows(sizes, _ROW if scope.path or notes.wide else _ROW_OVERVIEW)
    else:
        inner = layered(sizes, scope.edges, scope.inputs, scope.outputs)
    name, detail = shorten(clean(span(scope)), _LETTERS), shorten(clean(scope.class_name), _LETTERS)
    count = _count(scope)
    title = width(name, NAME, bold=True) + 8 + width(detail, DETAIL) + _count_width(count) + 2 * _PAD
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
    if item.count == 1:
        return ""
    return f"× {item.count}" + (", sizes vary" if isinstance(item, Scope) and item.varied else "")


def _count_width(count: str) -> float:
    return width(count, DETAIL, bold=True) + 22 if count else 0.0


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def clean_lines(lines: list[str], sites: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """Lines of a tip, without what XML cannot hold. All sites are named; of other long lists the end is cut off.

    Args:
        lines: the first lines.
        sites: a line for each site.
        more: further lines.
    """
    first, last = [clean(line) for line in lines if line], [clean(line) for line in more]
    shown = [*_cut(first), *(clean(site) for site in sites), *_cut(last)]
    return "\n".join(shown)


def _cut(lines: list[str]) -> list[str]:
    return lines[:_LINES] + ([f"… and {len(lines) - _LINES} more"] if len(lines) > _LINES else [])
