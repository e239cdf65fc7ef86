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


iadd = _augmented("iadd")
isub = _augmented("isub")
imul = _augmented("imul")
itruediv = _augmented("itruediv")
ifloordiv = _augmented("ifloordiv")
imod = _augmented("imod")
ipow = _augmented("ipow")
iand = _augmented("iand")
ior = _augmented("ior")
ixor = _augmented("ixor")
imatmul = _augmented("imatmul")

#: Name of the special method -> the target of the node.
SPECIAL_METHODS: dict[str, Callable[[Any, Any], Any]] = {
    f"__{act.__name__}__": act for act in (iadd, isub, imul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor, imatmul)
}
