"""Augmented assignments of traced values: `h += x` writes into the tensor that `h` is, which other names may share.

fx's proxy has none of them, so that Python falls back to `h = h + x`, and `skip = h; h *= 0.5` leaves `skip` as it was.
They are functions of this module and not of `operator`, for which fx would write `h += x` into the code of a graph,
and so give a new value to the name of another node where `h` is a number.
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

#: Name of the special method -> what becomes the node.
SPECIAL_METHODS: dict[str, Callable[[Any, Any], Any]] = {
    f"__{act.__name__}__": act for act in (iadd, isub, imul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor, imatmul)
}
