"""Blocks with sizes and places: what the text of every box says, and how large the box is because of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from hra_fx.view.columns import Size
from hra_fx.view.layout import Arrangement, Route, in_rows, layered
from hra_fx.view.panels import Block
from hra_fx.view.text import clean, shorten, width
from hra_fx.view.tree import Leaf, Scope, span

NAME, DETAIL = 12.5, 11.0  # font sizes
STRIP = 19.0  # height of the reflection on top of its layer
HEADER = 27.0  # height of an open scope's title
_PAD = 14.0
_ROW, _ROW_OVERVIEW = 1020.0, 240.0  # widest row of a scope without edges
_LETTERS = 34

Look: TypeAlias = Literal["port", "site", "plain", "eager", "closed", "captured", "python", "root"]
_OPEN = ("captured", "python", "root")


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


def place(block: Block, *, root: bool = False) -> Box:
    """Size a block and place all that is inside it.

    Args:
        block: the block.
        root: whether it is a whole panel, which gets neither border nor title.
    """
    if isinstance(block.item, Leaf):
        return _site(block.item) if block.item.kind == "site" else _leaf(block.item)
    if block.parts is None:
        return _closed(block.item, block.letter)
    return _open(block.item, block.parts, root=root)


def _site(leaf: Leaf) -> Box:
    name, detail, count = shorten(clean(span(leaf)), _LETTERS), clean(leaf.detail), _count(leaf)
    strip = f"r {leaf.rank} · d {leaf.width}" if leaf.rank else "no adapter in use"
    rotations = [mark.rotation for mark in leaf.marks if mark.rotation is not None]
    if rotations:
        strip += f" · |Q-I| {sum(rotations) / len(rotations):.2f}"
    if leaf.op == "eager":
        strip = f"r {leaf.rank} · d {leaf.width} · not called"
    if not leaf.marks:
        strip = "same layer, called again"
    wide = max(
        width(name, NAME, bold=True) + _count_width(count), width(detail, DETAIL), width(strip, DETAIL, bold=True) + 12
    )
    tip = [f"{leaf.target}: {detail}", strip, *(mark.path for mark in leaf.marks)]
    return Box(
        "site", Size(wide + 2 * _PAD, STRIP + 39), name, detail, clean_lines(tip), len(leaf.marks), strip, count=count
    )


def _leaf(leaf: Leaf) -> Box:
    name, detail, count = shorten(clean(span(leaf)), _LETTERS), shorten(clean(leaf.detail), _LETTERS), _count(leaf)
    detail = "" if detail == name else detail
    wide = width(name, NAME) + (7 + width(detail, DETAIL) if detail else 0) + _count_width(count) + 2 * _PAD
    tip = clean_lines([f"{leaf.target} ({leaf.op})", leaf.detail])
    if leaf.kind in ("input", "output"):
        return Box("port", Size(max(wide, 60), 24), name, detail, tip, 0)
    return Box("eager" if leaf.kind == "eager" else "plain", Size(max(wide, 70), 29), name, detail, tip, 0, count=count)


def _closed(scope: Scope, letter: str) -> Box:
    name, count = shorten(clean(span(scope)), _LETTERS), _count(scope)
    detail = shorten(clean(scope.class_name), _LETTERS)
    sites = len(scope.marks)
    if sites:
        detail += f" · {_number(sites, 'site')}"
    wide = max(width(name, NAME, bold=True) + _count_width(count), width(detail, DETAIL)) + (30 if letter else 0)
    tip = clean_lines([f"{scope.path or scope.name}: {scope.class_name}", *(mark.path for mark in scope.marks)])
    return Box("closed", Size(wide + 2 * _PAD, 47), name, detail, tip, sites, letter=letter, count=count)


def _open(scope: Scope, blocks: tuple[Block, ...], *, root: bool) -> Box:
    parts = [place(block) for block in blocks]
    sizes = [part.size for part in parts]
    if scope.eager:
        inner = in_rows(sizes, _ROW if scope.path else _ROW_OVERVIEW)
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
        "root" if root else "python" if scope.eager else "captured",
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


def clean_lines(lines: list[str]) -> str:
    """Lines of a tip, without what XML cannot hold; a long list is cut off."""
    shown = [clean(line) for line in lines if line]
    return "\n".join(shown[:20] + ([f"… and {len(shown) - 20} more"] if len(shown) > 20 else []))
