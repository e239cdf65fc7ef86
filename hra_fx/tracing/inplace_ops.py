"""Augmented assignments of traced values: `h += x` writes into the tensor `h`, which other variables may share.

`fx.Proxy` does not define them, so Python evaluates `h = h + x`, and after `skip = h; h *= 0.5` the graph would have
the wrong `skip`. They are functions of this module, not of `operator`, for which fx generates the code `h += x`: if `h`
is a number, that would reassign the variable of another node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    act = getattr(operator, name)

    def apply(value: Any, other: Any) -> Any:
        return act(value, other)

    apply.__name__ = apply.__qualname__ = name
    return apply


#: Name of the special method -> the target of the node.
SPECIAL_METHODS: dict[str, Callable[[Any, Any], Any]] = {}
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    # By name in this module, from which the code of a graph imports it.
    globals()[f"i{_name}"] = SPECIAL_METHODS[f"__i{_name}__"] = _augmented(f"i{_name}")
