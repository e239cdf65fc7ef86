"""Which modules of a picture are open, and the looks of boxes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TypeAlias

from hra_fx.view.tree import Item, Scope, signature

#: If no depth is set, modules are opened up to this number of boxes.
BUDGET = 60
#: Modules with at most this many items are opened each time they occur.
_SMALL = 3


#: Whether a module is open in a picture.
Opening: TypeAlias = Callable[[Scope], bool]


def look_of(item: Item, *, opened: bool) -> str:
    """The look of the box of an item."""
    if isinstance(item, Scope):
        return "closed" if not opened else "untraced" if item.eager else "traced"
    if item.kind in ("input", "output"):
        return "port"
    if item.kind == "adapted_layer":
        return "adapted_layer"
    return "trained" if item.trained else "eager" if item.kind == "eager" else "plain"


def opening(root: Scope, depth: int | None = None) -> Opening:
    """Which modules in a module, or in the model, are open.

    `depth` is the number of open levels, 0 for closed children. `None` opens up to `BUDGET` boxes: outer modules first,
    only the first of several modules that differ only in size, and only modules with adapted layers if there are any.
    """
    if depth is None:
        readable = _readable(root)
        return lambda scope: id(scope) in readable
    levels = depth + len(root.path.split(".")) * bool(root.path)
    return lambda scope: scope is root or scope.path.count(".") < levels


def _readable(root: Scope) -> set[int]:
    """The ids of the scopes that are open by default."""
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
