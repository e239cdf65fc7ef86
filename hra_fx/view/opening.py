"""Which modules of a picture are open: a number of levels, or as many as stay readable."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from hra_fx.view.repeats import signature
from hra_fx.view.tree import Item, Leaf, Scope

#: Number of boxes up to which modules are opened if no depth is given.
BUDGET = 60
#: Modules with at most this many items are opened each time they occur.
_SMALL = 3


@dataclass(frozen=True)
class Block:
    """A box of a picture: a leaf, a closed scope, or an open one with its parts.

    Attributes:
        item: what it stands for.
        parts: the blocks inside an open scope, `None` for a single box.
    """

    item: Item
    parts: tuple[Block, ...] | None = None

    @property
    def look(self) -> str:
        """How it is drawn."""
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
    """The ids of the scopes that are open at first.

    Args:
        root: the tree of a model, or of a module in it.
        depth: number of levels that are open, 0 for closed children. `None` opens outer modules first, the first one of
            those that differ only in size, and only modules with adapted layers if there are any, up to `BUDGET` boxes.
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
