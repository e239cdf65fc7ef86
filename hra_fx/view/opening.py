"""The options of a picture, and which modules are open: a number of levels, or as many as are readable."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral

from hra_fx.errors import VisualizeError
from hra_fx.reporting.heat import heat_named
from hra_fx.view.theme import THEMES, Theme
from hra_fx.view.tree import Item, Leaf, Scope, signature

#: If no depth is set, modules are opened up to this number of boxes.
BUDGET = 60
#: Modules with at most this many items are opened each time they occur.
_SMALL = 3


@dataclass(frozen=True)
class Options:
    """The options of a picture.

    Attributes:
        depth: number of open module levels: with 0, the children of the model are closed; with 1, they show their
            children. `None` uses the default of the format.
        focus: qualified name of the module to draw; `None` for the model.
        heat: the measure that colors adapted layers, a key of `reporting.heat.HEATS`; `None` for the change of the
            weight.
        theme: `"light"` or `"dark"`; `None` uses the default of the format.

    Raises:
        VisualizeError: an option has the wrong type or value.

    >>> Options(theme="sepia")
    Traceback (most recent call last):
        ...
    hra_fx.errors.VisualizeError: `theme` must be one of 'light', 'dark', got 'sepia'.
    """

    depth: int | None = None
    focus: str | None = None
    heat: str | None = None
    theme: Theme | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        if isinstance(self.depth, bool) or not isinstance(self.depth, Integral | None) or (self.depth or 0) < 0:
            raise VisualizeError(f"`depth` must be a non-negative int or None, got {self.depth!r}.")
        if not isinstance(self.focus, str | None):
            raise VisualizeError(
                f"`focus` must be a module's name as in model.named_modules(), got {type(self.focus).__name__}."
            )
        if self.heat is not None:
            heat_named(self.heat)
        if self.theme not in (None, *THEMES):
            raise VisualizeError(f"`theme` must be one of {', '.join(map(repr, THEMES))}, got {self.theme!r}.")


@dataclass(frozen=True)
class Block:
    """A box of a picture: a leaf, a closed scope, or an open scope with its parts.

    Attributes:
        item: the item that it represents.
        parts: the blocks inside an open scope; `None` for a single box.
    """

    item: Item
    parts: tuple[Block, ...] | None = None

    @property
    def look(self) -> str:
        """The look of the box."""
        if isinstance(self.item, Scope):
            return "closed" if self.parts is None else "untraced" if self.item.eager else "traced"
        if self.item.kind in ("input", "output"):
            return "port"
        if self.item.kind == "adapted_layer":
            return "adapted_layer"
        return "trained" if self.item.trained else "eager" if self.item.kind == "eager" else "plain"


def opened(root: Scope, depth: int | None, focus: str = "") -> Block:
    """The blocks of a model, or of a module in it; see `open_scopes`."""
    return _block(root, open_scopes(root, depth, focus))


def open_scopes(root: Scope, depth: int | None, focus: str = "") -> set[int]:
    """The ids of the scopes that are open first.

    Args:
        root: the tree of a model, or of a module in it.
        depth: number of open levels, 0 for closed children. `None` opens up to `BUDGET` boxes: outer modules first,
            only the first of several modules that differ only in size, and only modules with adapted layers if there
            are any.
        focus: path of the module.
    """
    if depth is None:
        return _readable(root)
    levels = depth + len(focus.split(".")) * bool(focus)
    return {id(scope) for scope in _scopes(root) if not scope.path or scope.path.count(".") < levels}


def _block(item: Item, is_open: set[int]) -> Block:
    if isinstance(item, Leaf) or id(item) not in is_open:
        return Block(item)
    return Block(item, tuple(_block(part, is_open) for part in item.items))


def _scopes(root: Scope) -> Iterator[Scope]:
    yield root
    for item in root.items:
        if isinstance(item, Scope):
            yield from _scopes(item)


def _readable(root: Scope) -> set[int]:
    level, is_open, seen = [root], {id(root)}, set[Hashable]()
    boxes = len(root.items)
    while level:
        inner = [item for scope in level for item in scope.items if isinstance(item, Scope)]
        level = []
        for scope in inner:
            looks, more = signature(replace(scope, count=1), sizes=False), len(scope.items) - 1
            wanted = (scope.marks or not root.marks) and (looks not in seen or len(scope.items) <= _SMALL)
            if wanted and boxes + more <= BUDGET:
                seen.add(looks)
                is_open.add(id(scope))
                level.append(scope)
                boxes += more
    return is_open
