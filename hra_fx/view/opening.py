"""Which modules of a picture are open."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hra_fx.view.tree import Scope

#: If no depth is set, modules are opened up to this number of boxes.
BUDGET = 60
#: Modules with at most this many items are opened each time they occur.
_SMALL = 3

#: Whether a module is open in a picture.
Opening: TypeAlias = Callable[[Scope], bool]


def opening(root: Scope, depth: int | None = None) -> Opening:
    """Which modules in a module, or in the model, are open.

    `depth` is the number of open levels, 0 for closed children. `None` opens up to `BUDGET` boxes: outer modules first,
    only the first of several similar modules, and only modules with adapted layers if there are any.
    """
    if depth is None:
        readable = _readable(root)
        return lambda scope: id(scope) in readable
    levels = depth + len(root.path.split(".")) * bool(root.path)
    return lambda scope: scope is root or scope.path.count(".") < levels


def _readable(root: Scope) -> set[int]:
    """The ids of the scopes that are open by default."""
    level, is_open, seen = [root], {id(root)}, set[tuple[str, int]]()
    boxes = len(root.items)
    while level:
        inner = [item for scope in level for item in scope.items if isinstance(item, Scope)]
        level = []
        for scope in inner:
            kind, more = (scope.class_name, len(scope.items)), len(scope.items) - 1
            wanted = (scope.marks or not root.marks) and (kind not in seen or len(scope.items) <= _SMALL)
            if wanted and boxes + more <= BUDGET:
                seen.add(kind)
                is_open.add(id(scope))
                level.append(scope)
                boxes += more
    return is_open
