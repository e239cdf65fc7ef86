"""Functions that a graph cannot go into: some may be kept as a call, and their dangerous neighbours may not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def even_rows(x: Tensor) -> Tensor:
    """A branch on a shape."""
    if x.shape[0] % 2:
        return F.pad(x, (0, 0, 0, 1))
    return x


def chained(x: Tensor, times: tuple[int, ...] = (1, 2), bias: Tensor | None = None) -> Tensor:
    """Another function that branches, a loop, a list of its own, an argument that may be None."""
    parts = []
    for count in times:
        parts.append(even_rows(x) * count)
    out = torch.stack(parts).sum(0)
    if bias is not None:
        out = out + bias
    return out[: x.shape[0]]


def two(x: Tensor) -> tuple[Tensor, int]:
    """A tuple, of a tensor and a number that depends on the shape."""
    count = 3 if x.shape[0] > 4 else 2
    return x * count, count


def without_gradient(x: Tensor) -> Tensor:
    """A context that a graph drops."""
    with torch.no_grad():
        y = x * 2
    return y


def rows_of(sizes: list[Any], x: Tensor) -> Tensor:
    """A list that is only looked into."""
    count = 2 if sizes[0] > 4 else 3
    return x * count


def perhaps(x: Tensor) -> Tensor | None:
    """None of few rows."""
    return x if x.shape[0] > 3 else None


def falls_off(x: Tensor) -> Any:
    if x.shape[0] > 3:
        return x


def named_none(x: Tensor) -> Any:
    found = None
    if x.shape[0] > 3:
        found = x
    return found


def none_from_another(x: Tensor) -> Any:
    return perhaps(x)


def none_from_a_list(x: Tensor) -> Any:
    found = [x]
    same = found
    if x.shape[0] <= 3:
        same[0] = None  # type: ignore[call-overload]
    return found[0]


def none_from_an_appended_list(x: Tensor) -> Any:
    found: list[Any] = []
    found.append(x if x.shape[0] > 3 else None)
    return found[0]


def none_from_a_product(x: Tensor) -> Any:
    found = [None] * 2
    if x.shape[0] > 3:
        found = [x, x]
    return found[0]


def none_from_a_dict(x: Tensor) -> Any:
    return {4: x, 5: x}.get(x.shape[0])


def none_by_default(x: Tensor, other: Tensor | None = None) -> Any:
    return x if x.shape[0] > 3 else other


def _either(x: Tensor, other: Any = 1) -> Any:
    return x if x.shape[0] > 3 else other


def none_by_keywords(x: Tensor) -> Any:
    return _either(x, **{"other": None})


def none_in_default(x: Tensor, pair: tuple[Any, ...] = (None, 1)) -> Any:
    return x if x.shape[0] > 3 else pair[0]


def swallowed(x: Tensor) -> Any:
    with contextlib.suppress(ValueError):
        if x.shape[0] <= 3:
            raise ValueError
        return x


def caught(x: Tensor) -> Any:
    try:
        return x if x.shape[0] > 3 else None
    finally:
        pass


def of_attribute(x: Tensor) -> Any:
    return x if x.shape[0] > 99 else x.grad


def counted(f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)
    def run(*args: Any) -> Any:
        return f(*args)

    return run


@counted
def wrapped(x: Tensor) -> Any:
    return x if x.shape[0] > 3 else None


def fill(found: list[Tensor], x: Tensor) -> Tensor:
    """Changes the list that it is given."""
    if x.shape[0] > 3:
        found.append(x * 2)
    return x


def write(found: dict[str, Tensor], x: Tensor) -> Tensor:
    if x.shape[0] > 3:
        found["more"] = x * 2
    return x


def alias(found: list[Tensor], x: Tensor) -> Tensor:
    same = found
    if x.shape[0] > 3:
        same[0] = x * 2
    return x


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """Calls a layer that it is given."""
    return layer(x) if x.shape[0] > 3 else layer(x * 2)


def numbered(x: Tensor) -> Tensor:
    """Loops over a value, takes it for a number: all of what a traced value is not."""
    count = int(x.shape[0])
    return torch.stack([row * count for row in x])
